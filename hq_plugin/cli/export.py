"""`hq-plugin export`: a saved model as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hq_plugin.cli.data import load_data
from hq_plugin.cli.errors import one_line_errors
from hq_plugin.cli.models import example_inputs, load_saved
from hq_plugin.cli.options import DATA, AsJson, Debug, ModelArgs, Saved, Skeleton
from hq_plugin.cli.output import say, say_json


def export(
    directory: Saved,
    out: Annotated[Path, typer.Option(help="The ONNX file.")],
    model: Skeleton = None,
    data: Annotated[str | None, typer.Option(help=f"Gives the example inputs. {DATA}")] = None,
    model_arg: ModelArgs = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a saved model as an ONNX file for ONNX Runtime.

    \b
    Examples:
      hq-plugin export small --out small.onnx
      hq-plugin export small --model my_project:model --data my_project:batches --out small.onnx
    """
    import hq_plugin
    from hq_plugin.storage import check_file_place

    with one_line_errors(debug):
        check_file_place(out)
        source = load_saved(directory, model, model_arg)
        written = hq_plugin.export(source.model, out, example_inputs(source, load_data(data, source, test=True)))
        if as_json:
            layers = {layer.name: [layer.width, layer.operator] for layer in written.layers}
            say_json(
                {
                    "path": str(written.path),
                    "size": written.size,
                    "difference": written.difference,
                    "layers": layers,
                }
            )
        else:
            say(written)
