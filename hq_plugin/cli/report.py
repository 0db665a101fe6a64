"""`hq-plugin report`: the report of a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hq_plugin.cli.errors import one_line_errors
from hq_plugin.cli.options import AsJson, Debug, Saved
from hq_plugin.cli.output import say, say_json


def report(
    directory: Saved,
    out: Annotated[
        Path, typer.Option(help="A file that ends in .html, .json, or .png, .svg or .pdf; an old one is replaced.")
    ] = Path("report.html"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write the report of a saved model: what was decided, why, and what it gave.

    \b
    Examples:
      hq-plugin report small
      hq-plugin report small --out small.pdf
      hq-plugin report small --json | jq '.layers[] | [.name, .weight_bits]'
    """
    from hq_plugin.artifact import read_result
    from hq_plugin.report import gather

    with one_line_errors(debug):
        result = read_result(directory)
        if as_json:
            say_json(gather(result).to_json())
        else:
            say(f"written to {result.report(out)}")
