"""`hq-plugin export`: a saved model as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hq_plugin.cli.errors import one_line_errors
from hq_plugin.cli.models import load_saved
from hq_plugin.cli.options import DATA, MODEL, Debug, ModelArgs, Saved


def export(
    directory: Saved,
    out: Annotated[Path, typer.Option(help="The ONNX file.")],
    model: Annotated[str | None, typer.Option(help=f"{MODEL} Not needed for timm and Hugging Face models.")] = None,
    data: Annotated[str | None, typer.Option(help=f"Gives the example inputs. {DATA}")] = None,
    model_arg: ModelArgs = None,
    debug: Debug = False,
) -> None:
    """Write a saved model as an ONNX file for ONNX Runtime.

    Example: hq-plugin export small --out small.onnx
    """
    import hq_plugin

    with one_line_errors(debug):
        loaded, inputs = load_saved(directory, model, model_arg, data)
        print(hq_plugin.export(loaded, out, inputs))
