"""`hq-plugin profile`: times of layers on this machine, in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hq_plugin.cli.data import load_data
from hq_plugin.cli.errors import one_line_errors
from hq_plugin.cli.models import load_model
from hq_plugin.cli.options import ActivationBits, Data, Debug, Model, ModelArgs, Target, WeightBits
from hq_plugin.cli.widths import width_options


def profile(
    model: Model,
    out: Annotated[Path, typer.Option(help="The file, JSON.")],
    data: Data = None,
    model_arg: ModelArgs = None,
    target: Annotated[Target, typer.Option(help="What to measure.")] = Target.torch,
    batch: Annotated[int, typer.Option(help="Samples of a forward.")] = 1,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    debug: Debug = False,
) -> None:
    """Measure how long each layer takes at each width on this machine, for budgets such as 8ms.

    Example: hq-plugin profile resnet18 --target onnxruntime --out laptop.json
    """
    import hq_plugin

    with one_line_errors(debug):
        options = {"target": target.value, **width_options(weight_bits, activation_bits)}
        float_model = load_model(model, model_arg)
        batches = None if data is None else load_data(data, float_model, test=False)
        measured = hq_plugin.profile(float_model, batches, batch=batch, **options)
        measured.save(out)
        for name, times in measured.layers.items():
            print("  ".join((name, *(f"{key}: {ms:.3f}" for key, ms in times.items()))))
        print(f"{measured.machine}; {measured.rest:.3f} ms of the model are no layer's; saved to {out}")
