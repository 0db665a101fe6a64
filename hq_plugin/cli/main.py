"""The application: its name, its help, and one line for each command. What a command does is in its own file.

Results go to stdout; progress, warnings and errors to stderr. What a user can put right is one line with
what to do, and exit code 2; anything else has exit code 1. `--debug` shows the traceback of both.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hq_plugin.cli.demo import demo
from hq_plugin.cli.errors import OneLineGroup
from hq_plugin.cli.evaluate import evaluate
from hq_plugin.cli.explore import explore
from hq_plugin.cli.export import export
from hq_plugin.cli.inspect import inspect
from hq_plugin.cli.meta_train import meta_train
from hq_plugin.cli.profile import profile
from hq_plugin.cli.quantize import quantize
from hq_plugin.cli.report import report

app = typer.Typer(
    name="hq-plugin",
    cls=OneLineGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _Command(TyperCommand):
    """A command whose paths, models and data may begin with `~`, which bash does not expand in `--out=~/small`."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command, and leaves the job of several processes that it was part of, where it ends well."""
        ctx.params = {
            name: type(value)(os.path.expanduser(value)) if isinstance(value, (str, Path)) else value
            for name, value in ctx.params.items()
        }
        result = super().invoke(ctx)
        from hq_plugin.distribution import leave  # which imports torch: not for --help

        leave()
        return result


for _command in (quantize, meta_train, profile, export, inspect, report, explore, evaluate, demo):
    app.command(cls=_Command)(_command)


def _version(wanted: bool) -> None:
    if wanted:
        from hq_plugin import __version__

        print(f"hq-plugin {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Low-bit hybrid quantization of PyTorch models, searched and trained in one call.

    \b
    Examples:
      hq-plugin demo
      hq-plugin quantize resnet18 12% --pretrained --data photographs/ --out small
      hq-plugin inspect small
      hq-plugin report small
      hq-plugin quantize --help

    \b
    Exit codes:
      0    done
      1    an error in the code of a model, of data or of hq_plugin itself; --debug shows where
      2    something that you can put right: the line on stderr says what and how
      130  interrupted

    Results go to stdout (--json for programs), progress, warnings and errors to stderr.
    """
