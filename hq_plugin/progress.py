"""Progress with time left, on stderr: bars by rich on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Seconds between two lines where stderr is no terminal. What takes less is silent.
SECONDS = 30.0


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


class _Lines:
    """Stands in for rich's display where nobody watches: what runs says every now and then how far it is."""

    def __init__(self) -> None:
        self._told = time.monotonic()
        self._tasks: list[tuple[str, int, float]] = []
        self._done: list[int] = []

    def add_task(self, description: str, total: int, figures: str) -> int:
        self._tasks.append((description, total, time.monotonic()))
        self._done.append(0)
        return len(self._tasks) - 1

    def update(self, task: int, advance: int, figures: str) -> None:
        (description, total, began), now = self._tasks[task], time.monotonic()
        self._done[task] += advance
        if now - self._told < SECONDS:
            return
        self._told, done = now, self._done[task]
        left = (now - began) * (total - done) / max(done, 1) / 60
        parts = [f"{done} of {total}", f"{left:.0f} min left" if left >= 1 else "under a minute left", figures]
        print(f"{description}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)


_active: Bars | None = None


@contextmanager
def progress(enabled: bool | None = None) -> Iterator[Bars]:
    """Shows bars while inside; used inside another, it adds to that one's, or is silent as that one is.

    Args:
        enabled: Whether to show them; None shows bars if stderr is a terminal, and else a line every `SECONDS`.
            Of several processes only the first shows any.
    """
    global _active
    if _active is not None:
        yield _active
        return
    show = sys.stderr.isatty() if enabled is None else enabled
    first = os.environ.get("RANK", "0") == "0"
    if not show or not first:
        _active = Bars(_Lines() if first and enabled is None else None)
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
