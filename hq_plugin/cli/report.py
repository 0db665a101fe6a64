"""`hq-plugin report`: what was decided for a saved model, and why, as a page, as data or as a figure."""

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
        Path | None,
        typer.Option(
            help="A file that ends in .html, .json, .png, .svg or .pdf; an old one is replaced. report.html unless "
            "said otherwise."
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write what was decided for a saved model, and why.

    The page needs no network, and writing it does not load the model. Figures (.png, .svg, .pdf) need matplotlib.
    With --json the data of the page is printed, and a file is written only where --out names one.

    \b
    Examples:
      hq-plugin report small
      hq-plugin report small --out small.pdf
      hq-plugin report small --json | jq '.layers[] | [.name, .weight_bits, .sensitivity]'
    """
    from hq_plugin.artifact import read_result
    from hq_plugin.report import gather

    with one_line_errors(debug):
        result = read_result(directory)
        if out is not None or not as_json:
            path = result.report(out or Path("report.html"))
            if not as_json:
                say(f"wrote {path}")
        if as_json:
            say_json(gather(result).to_json())
