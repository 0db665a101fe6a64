"""`hq-plugin quantize`: a float model in, a saved quantized one out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from hq_plugin.cli.data import load_data
from hq_plugin.cli.errors import one_line_errors
from hq_plugin.cli.models import load_model
from hq_plugin.cli.options import ActivationBits, AsJson, Data, Debug, Effort, Model, ModelArgs, Target, WeightBits
from hq_plugin.cli.output import print_result
from hq_plugin.cli.widths import width_options
from hq_plugin.errors import ArtifactError, ArtifactPathError


def quantize(
    model: Model,
    budget: Annotated[
        str, typer.Argument(help='"3bit", "250KB", "12%", "1.5GBitOps", "8ms", or several joined by +.')
    ],
    out: Annotated[Path, typer.Option(help="Directory for the quantized model.")],
    data: Data = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Float weights, a .safetensors file.")] = None,
    model_arg: ModelArgs = None,
    pretrained: Annotated[bool, typer.Option(help="Let timm download pretrained weights.")] = False,
    effort: Annotated[Effort, typer.Option(help="How long it may take.")] = Effort.balanced,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    target: Annotated[Target, typer.Option(help="Use widths that this runs fast.")] = Target.storage,
    profile: Annotated[Path | None, typer.Option(help="Times of layers, from hq-plugin profile.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a model saved there before.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Quantize a float model to a budget and save it.

    Example: hq-plugin quantize my_project.models:resnet 3bit --data my_project.data:train --out small
    """
    import hq_plugin

    with one_line_errors(debug):
        _check_out(out, overwrite)
        options: dict[str, Any] = {"effort": effort.value, "seed": seed, "target": target.value, "profile": profile}
        options |= width_options(weight_bits, activation_bits)
        float_model = load_model(model, model_arg, checkpoint, pretrained)
        batches = None if data is None else load_data(data, float_model, test=False)
        packed = hq_plugin.quantize(float_model, budget, batches, **options)
        hq_plugin.save(packed, out, overwrite=overwrite)
        result = cast(hq_plugin.Result, packed.hq)
        if as_json:
            print(json.dumps({**result.to_json(), "history": None}))
        else:
            print_result(result)
            print(f"saved to {out}")


def _check_out(out: Path, overwrite: bool) -> None:
    """Finds out before the work, not after it, that the result would have no place."""
    from hq_plugin.artifact import read_info

    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        read_info(out)
    except ArtifactError as error:
        raise ArtifactPathError(f"{out} holds something else. Choose a new directory.") from error
    if not overwrite:
        raise ArtifactPathError(f"{out} holds a saved model. Give --overwrite or another directory.")
