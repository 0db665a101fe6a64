"""Rows of measurements: one JSON object a line, appended whole, never measured twice."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FOLDER = Path("docs/benchmarks")
MATRIX, CLAIMS, RIVALS = FOLDER / "matrix.jsonl", FOLDER / "claims.jsonl", FOLDER / "rivals.jsonl"
#: Training steps of libraries that are trained by our loop (`tests/benchmarks/rivals/hand.py`).
RIVAL_STEPS = 300
#: What a row of the matrix is known by.
KEY = ("model", "seed", "method", "budget", "steps")


def read(path: Path) -> list[Row]:
    """Returns the rows of a file; a line that a stop cut short is passed over, and measured again."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def append(path: Path, row: Row) -> None:
    """Appends a row, on a line of its own even after a line that a stop cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write(("\n" if cut else "") + json.dumps(row) + "\n")


def key(row: Row, names: Sequence[str] = KEY) -> tuple[Any, ...]:
    """Returns what a row is known by."""
    return tuple(row.get(name) for name in names)


def latest(rows: Sequence[Row], names: Sequence[str] = KEY) -> list[Row]:
    """Returns the last row of each key: a retry that worked takes the place of the failure before it."""
    return list({key(row, names): row for row in rows}.values())


def done(rows: Sequence[Row], retry: bool, names: Sequence[str] = KEY) -> set[tuple[Any, ...]]:
    """Returns the keys that need no measurement: failures are among them, unless they are to be retried."""
    return {key(row, names) for row in latest(rows, names) if not (retry and "error" in row)}
