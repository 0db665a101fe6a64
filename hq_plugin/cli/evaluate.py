"""`hq-plugin evaluate`: the accuracy of a saved model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from hq_plugin.cli.data import load_data
from hq_plugin.cli.errors import one_line_errors
from hq_plugin.cli.models import load_model
from hq_plugin.cli.options import DATA, MODEL, AsJson, Debug, ModelArgs, Saved


def evaluate(
    directory: Saved,
    data: Annotated[str, typer.Option(help=DATA)],
    model: Annotated[str | None, typer.Option(help=f"{MODEL} Not needed for timm models.")] = None,
    model_arg: ModelArgs = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure the accuracy of a saved model on labelled data.

    Of digits and fashion-mnist the test part is taken, which quantize does not use.
    """
    import hq_plugin
    from hq_plugin.evaluation import accuracy

    with one_line_errors(debug):
        skeleton = None if model is None else load_model(model, model_arg)
        loaded = hq_plugin.load(directory, skeleton)
        share, samples = accuracy(loaded, load_data(data, loaded, test=True), hq_plugin.Config())
        if as_json:
            print(json.dumps({"accuracy": share, "samples": samples}))
        else:
            print(f"accuracy {share:.4f} on {samples} samples")
