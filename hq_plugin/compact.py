"""Results as compact JSON, for storing: a small model must stay small on disk.

Histories are thinned, numbers of charts are rounded, lists of records become tables that name their fields once,
and policies list widths in the order of the layers. What is read back is a `Result` like any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hq_plugin.errors import ArtifactError
from hq_plugin.result import Result
from hq_plugin.storage import JSON_LIMIT, write_text
from hq_plugin.untrusted import clean_errors, read_file

#: The compact result beside a model that its own library saved.
REPORT_FILE = "hq_result.json"
#: Records that are kept of each history, and as many of those that were the best of a search until then.
HISTORY = 50
#: Significant digits of what a report shows in charts; the model itself is stored exactly.
DIGITS = 4
_ROUNDED = ("history", "sensitivities", "front", "seconds", "layers")
_TABLES = ("layers", "float_layers", "sensitivities", "front")


def compact(result: Result) -> dict[str, Any]:
    """Returns a result as JSON values that `expand` reads back."""
    data = result.to_json()
    data["history"] = {name: _thin(records) for name, records in result.history.items()}
    data |= {name: _rounded(data[name]) for name in _ROUNDED}
    names = [layer.name for layer in result.layers]
    for holder in (data, *data["baselines"].values()):
        if list(holder["policy"]) == names:
            holder["policy"] = list(holder["policy"].values())
    data |= {name: _table(data[name]) for name in _TABLES}
    data["history"] = {name: _table(records) for name, records in data["history"].items()}
    return data


def expand(stored: Mapping[str, Any]) -> Result:
    """Reads what `compact` wrote, or a result's own JSON.

    Raises:
        ArtifactError: A field is missing or has the wrong form.
    """
    with clean_errors("The saved report"):
        data = {name: _records(value) if name in _TABLES else value for name, value in stored.items()}
        data["history"] = {name: _records(table) for name, table in stored["history"].items()}
        names = [layer["name"] for layer in data["layers"]]

        def named(holder: Mapping[str, Any]) -> dict[str, Any]:
            policy = holder["policy"]
            listed = isinstance(policy, list)
            return {**holder, "policy": dict(zip(names, policy, strict=True)) if listed else policy}

        data["baselines"] = {name: named(baseline) for name, baseline in stored["baselines"].items()}
        return Result.from_json(named(data))


def write_beside(result: Result, directory: str | Path) -> Path:
    """Writes a result into the folder of a model that its own library saved."""
    path = Path(directory) / REPORT_FILE
    write_text(path, json.dumps(compact(result), separators=(",", ":")))
    return path


def read_beside(directory: str | Path) -> Result | None:
    """Reads what `write_beside` wrote, or returns None where there is none.

    Raises:
        ArtifactError: The file is damaged.
    """
    path = Path(directory).expanduser() / REPORT_FILE
    if not path.exists():
        return None
    with clean_errors(f"{path}, without which the model works,"):
        try:
            text = read_file(path, JSON_LIMIT)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error}. Remove it; the model works without.") from error
        return expand(json.loads(text))


def _thin(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keeps every so many records, and of a search those that were the best until then; policies are left out."""
    kept = {*range(0, len(records), max(1, -(-len(records) // HISTORY))), *range(len(records))[-1:]}
    best = math.inf
    leaders = []
    for number, record in enumerate(records):
        if record.get("score", math.inf) < best:
            best = record["score"]
            leaders.append(number)
    kept.update(leaders[-HISTORY:])
    return [{k: v for k, v in records[n].items() if k != "policy"} for n in sorted(kept)]


def _rounded(value: Any) -> Any:
    """Rounds the floats in JSON values to `DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def _table(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Writes records of the same fields as rows under those fields; what is the same in all is written once."""
    first = records[0] if records else {}
    same = {name: value for name, value in first.items() if all(r.get(name, r) == value for r in records)}
    fields = [name for name in first if name not in same]
    return {"same": same, "fields": fields, "rows": [[record.get(name) for name in fields] for record in records]}


def _records(table: Any) -> Any:
    """Reads what `_table` wrote; a list of records is returned as it is."""
    if not isinstance(table, dict):
        return table
    return [table["same"] | dict(zip(table["fields"], row, strict=True)) for row in table["rows"]]
