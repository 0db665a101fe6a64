"""What the command line makes of errors and warnings: one line each on stderr, and an exit code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from hq_plugin.errors import HQError


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Turns errors into one line on stderr and an exit code, and warnings into one line each.

    Args:
        debug: Whether to let errors through, with their traceback.
    """
    with warnings.catch_warnings():
        if not debug:
            warnings.showwarning = lambda message, *_: typer.secho(f"warning: {message}", fg="yellow", err=True)
        try:
            yield
        except typer.Exit:
            raise
        except Exception as error:
            if debug:
                raise
            expected = isinstance(error, (HQError, OSError))
            text = str(error) if expected else f"{type(error).__name__}: {error} (--debug shows the traceback)"
            typer.secho(f"error: {' '.join(text.split())}", fg="red", err=True)
            raise typer.Exit(2 if expected else 1) from error
