"""What the command line makes of errors, wrong usage and warnings: one line each on stderr, and an exit code."""

from __future__ import annotations

import os
import select
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from hq_plugin.errors import HQError

#: Exit codes; 0 is success. Wrong usage, which typer finds, is FIXABLE as well.
UNEXPECTED, FIXABLE, INTERRUPTED = 1, 2, 130
#: What typer raises for a wrong option; typer has no public name for it.
_UsageError: Any = typer.BadParameter.__base__


class OneLineGroup(TyperGroup):
    """Commands that answer a wrong option as `one_line_errors` answers any error: without the usage."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Runs a command and, unless `standalone_mode` is off, exits with its code."""
        if not extra.get("standalone_mode", True):
            return super().main(*args, **extra)
        try:
            code = super().main(*args, **(extra | {"standalone_mode": False}))
        except _UsageError as error:
            if error.ctx is None or error.message == error.ctx.get_help():  # no command at all was given
                error.show()
            else:
                told = error.format_message().rstrip(".")
                _line("error", f"{told}. {error.ctx.command_path} --help lists what is possible.", "red")
            sys.exit(FIXABLE)
        sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def one_line_errors(debug: bool, resumable: bool = False) -> Iterator[None]:
    """Turns errors into one line on stderr and an exit code, and warnings into one line each.

    Args:
        debug: Whether to let errors through, with their traceback.
        resumable: Whether the command has `--checkpoint-dir`.
    """
    with warnings.catch_warnings():
        if not debug:
            warnings.showwarning = lambda message, *_: _line("warning", str(message), "yellow")
        try:
            yield
        except typer.Exit:
            raise
        except BrokenPipeError as error:
            if not _reader_left():  # a worker's pipe, say
                _line("error", f"{error}: a process that this one writes to has ended.", "red")
                raise typer.Exit(FIXABLE) from error
            # Whoever read our output, `head` for one, has seen enough; Python would complain when it flushes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except KeyboardInterrupt as error:
            # A stage that knows what was kept says so.
            advice = " With --checkpoint-dir the same command goes on from there." if resumable else ""
            _line("error", str(error) or f"Interrupted.{advice}", "red")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if debug:
                raise
            expected = isinstance(error, (HQError, OSError))
            text = str(error) if expected else f"{type(error).__name__}: {error} (--debug shows the traceback)"
            _line("error", text, "red")
            raise typer.Exit(FIXABLE if expected else UNEXPECTED) from error


def _reader_left() -> bool:
    """Whether nobody reads our output any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _line(kind: str, text: str, color: str) -> None:
    typer.secho(f"{kind}: {' '.join(text.split())}", fg=color, err=True)
