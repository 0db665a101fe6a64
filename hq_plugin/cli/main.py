"""The application: its name, its help, and one line for each command. What a command does is in its own file.

Results go to stdout; progress, warnings and errors to stderr. What a user can put right is one line with
what to do, and exit code 2; anything else has exit code 1. `--debug` shows the traceback of both.
"""

from __future__ import annotations

import typer

from hq_plugin.cli.demo import demo
from hq_plugin.cli.evaluate import evaluate
from hq_plugin.cli.export import export
from hq_plugin.cli.inspect import inspect
from hq_plugin.cli.profile import profile
from hq_plugin.cli.quantize import quantize

app = typer.Typer(
    name="hq-plugin",
    help="Low-bit hybrid quantization of PyTorch models, searched and trained in one call.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(quantize)
app.command()(profile)
app.command()(export)
app.command()(inspect)
app.command()(evaluate)
app.command()(demo)
