"""Finished measurements, one JSON line each, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Records:
    """A file of rows; a row is found again by its key fields.

    Args:
        path: The file; it need not exist.
        key: The fields that tell rows apart.
    """

    def __init__(self, path: Path, key: tuple[str, ...]) -> None:
        self.path, self.key = path, key
        self.rows: list[Row] = []
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            # A last line without its end was being written when the run was stopped.
            self.rows = [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]

    def find(self, fields: Mapping[str, Any]) -> Row | None:
        """Returns the row whose key fields are these, or None."""
        return next((row for row in self.rows if all(row[k] == fields[k] for k in self.key)), None)

    def add(self, row: Row) -> None:
        """Adds a row, in the file too. A row with the same key is replaced."""
        self.rows = [old for old in self.rows if any(old[k] != row[k] for k in self.key)] + [row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(partial, self.path)
