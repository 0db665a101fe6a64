"""`hq-plugin profile`: times of layers on this machine, in a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hq_plugin.cli.config import config_options
from hq_plugin.cli.data import load_data
from hq_plugin.cli.errors import one_line_errors
from hq_plugin.cli.models import load_model
from hq_plugin.cli.options import (
    ActivationBits,
    AsJson,
    Data,
    Debug,
    Model,
    ModelArgs,
    Options,
    Target,
    WeightBits,
)
from hq_plugin.cli.output import say, say_json


def profile(
    model: Model,
    out: Annotated[Path, typer.Option(help="The file, JSON.")],
    data: Data = None,
    model_arg: ModelArgs = None,
    target: Annotated[
        Target, typer.Option(help="What to measure, as for hq-plugin quantize; storage: every width, in PyTorch.")
    ] = Target.storage,
    batch: Annotated[int, typer.Option(help="Samples of a forward.", min=1)] = 1,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    option: Options = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure the layers' times on this machine, for budgets in ms.

    Each layer is timed at each width, once; the file is for --profile of hq-plugin quantize, with the same
    --target, and of hq-plugin explore. A model of module:function needs --data; weights may be random.

    \b
    Examples:
      hq-plugin profile resnet18 --target onnxruntime --out laptop.json
      hq-plugin profile my_project:model --data my_project:batches --batch 8 --out laptop8.json
      hq-plugin quantize resnet18 8ms --pretrained --data photographs/ --out small \\
        --target onnxruntime --profile laptop.json
      hq-plugin quantize my_project:model "20ms for 8 samples" --data my_project:batches --out small \\
        --profile laptop8.json
    """
    import hq_plugin
    from hq_plugin.storage import check_file_place

    with one_line_errors(debug):
        check_file_place(out)
        options = config_options(option, target=target, weight_bits=weight_bits, activation_bits=activation_bits)
        source = load_model(model, model_arg)
        options |= {} if source.processor is None else {"processor": source.processor}
        measured = hq_plugin.profile(source.model, load_data(data, source), batch=batch, **options)
        measured.save(out)
        if as_json:
            say_json(asdict(measured))
            return
        for name, widths in measured.layers.items():
            fastest = {key: min(kernels.items(), key=lambda item: item[1]) for key, kernels in widths.items()}
            say("  ".join((name, *(f"{key}: {ms:.3f} ({kernel})" for key, (kernel, ms) in fastest.items()))))
        say(f"{measured.machine}; {measured.rest:.3f} ms of the model are no layer's; saved to {out}")
