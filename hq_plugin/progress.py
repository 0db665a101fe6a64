"""Progress bars with time left, on stderr, by rich. Off where stderr is no terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Task:
    """One bar. `advance` moves it on, and shows figures beside it."""

    def __init__(self, bars: Any = None, task_id: Any = None) -> None:
        self._bars, self._id = bars, task_id

    def advance(self, n: int = 1, **figures: float | str) -> None:
        """Moves on by `n`, and shows each figure as `name value`."""
        if self._bars is not None:
            shown = "  ".join(
                f"{name} {value}" if isinstance(value, str) else f"{name} {value:.4g}"
                for name, value in figures.items()
            )
            self._bars.update(self._id, advance=n, figures=shown)


class Bars:
    """Bars shown together; without an underlying display it does nothing."""

    def __init__(self, display: Any = None) -> None:
        self._display = display

    def task(self, description: str, total: int) -> Task:
        """Adds a bar for `total` units of work."""
        if self._display is None:
            return Task()
        return Task(self._display, self._display.add_task(description, total=total, figures=""))


_active: Bars | None = None


@contextmanager
def progress(enabled: bool | None = None) -> Iterator[Bars]:
    """Shows bars while inside; used inside another, it adds to that one's, or is silent as that one is.

    Args:
        enabled: Whether to show them; None shows them if stderr is a terminal. Of several processes
            only the first shows any.
    """
    global _active
    if _active is not None:
        yield _active
        return
    show = sys.stderr.isatty() if enabled is None else enabled
    if not show or os.environ.get("RANK", "0") != "0":
        _active = Bars()
        try:
            yield _active
        finally:
            _active = None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as display:
        _active = Bars(display)
        try:
            yield _active
        finally:
            _active = None
