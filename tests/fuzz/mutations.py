"""How a stranger's files differ from ours: mutations as plain JSON values, so that a case can be kept as text.

A case is `{"reseal": bool, "changes": [[kind, ...], ...]}`. `reseal` makes all checksums right again, as somebody
would who does it on purpose.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Case = dict[str, Any]
Files = dict[str, bytes]

#: Stands for JSON that is nested more deeply than Python's stack.
_DEEP, _DEPTH = "@deep@", 100_000
_LINKS = ("/dev/zero", "/dev/urandom", "/etc/passwd", "../../../../etc/passwd", "/", "fifo", "nowhere")

_place = st.integers(0, 10**6)
_which = st.integers(0, 3)
_value = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.sampled_from([0, -1, 1, 2, 9, 16, 2**31, 2**63, 10**9, 10**15, 10**400]),
    st.floats(),
    st.sampled_from(
        ["", "pickle", "float64", "F64", "I64", "../../etc/passwd", "/etc/passwd", "\0", "é" * 999, _DEEP]
    ),
    st.lists(st.integers(-2, 10**18), max_size=4),
    st.dictionaries(st.sampled_from(["a", "shape", "bits"]), st.integers(), max_size=2),
)
_change = st.one_of(
    st.tuples(st.just("flip"), _which, _place, st.integers(0, 7)),
    st.tuples(st.just("cut"), _which, _place),
    st.tuples(st.just("insert"), _which, _place, st.binary(min_size=1, max_size=40).map(bytes.hex)),
    st.tuples(st.just("grow"), _which, st.sampled_from([1, 8, 4096])),
    st.tuples(st.just("set"), st.lists(_place, min_size=1, max_size=5), _value),
    st.tuples(st.just("drop"), st.lists(_place, min_size=1, max_size=5)),
    st.tuples(st.just("header"), _place, st.sampled_from(["dtype", "shape", "data_offsets"]), _value),
    st.tuples(st.just("rename"), _place, st.sampled_from(["", "x", "__metadata__", "../x", "a.b.weight_step"])),
    st.tuples(st.just("link"), _which, st.sampled_from(_LINKS)),
    st.tuples(st.just("exchange")),
)
cases = st.builds(
    lambda reseal, changes: {"reseal": reseal, "changes": [list(change) for change in changes]},
    st.booleans(),
    st.lists(_change, min_size=1, max_size=3),
)


def mutated(files: Files, changes: list[list[Any]]) -> tuple[Files, dict[str, str]]:
    """Applies changes to the contents of files.

    Returns:
        The new contents, and the files that become links, with their targets.
    """
    files, links, names = dict(files), {}, list(files)
    for kind, *rest in changes:
        name = names[rest[0] % len(names)] if rest and isinstance(rest[0], int) else names[0]
        raw = files[name]
        if kind == "flip" and raw:
            position = rest[1] * (len(raw) - 1) // 10**6
            files[name] = raw[:position] + bytes([raw[position] ^ 1 << rest[2]]) + raw[position + 1 :]
        elif kind == "cut":
            files[name] = raw[: rest[1] * len(raw) // 10**6]
        elif kind == "insert":
            position = rest[1] * len(raw) // 10**6
            files[name] = raw[:position] + bytes.fromhex(rest[2]) + raw[position:]
        elif kind == "grow":
            files[name] = raw + bytes(rest[1])
        elif kind in ("set", "drop"):
            json_name = next((n for n in names if n.endswith(".json")), names[0])
            files[json_name] = _json_changed(files[json_name], rest[0], rest[1:])
        elif kind in ("header", "rename"):
            for tensors in (n for n in names if n.endswith(".safetensors")):
                files[tensors] = _header_changed(files[tensors], kind, rest)
        elif kind == "link":
            links[name] = rest[1]
        elif kind == "exchange" and len(names) > 1:
            files[names[0]], files[names[1]] = files[names[1]], files[names[0]]
    return files, links


def _json_changed(raw: bytes, path: list[int], value: list[Any]) -> bytes:
    """Replaces the value at a place of JSON, or drops it where there is no value."""
    try:
        root = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    node, key, holder = root, None, None
    for pick in path:
        if not isinstance(node, (dict, list)) or not node:
            break
        holder, key = node, list(node)[pick % len(node)] if isinstance(node, dict) else pick % len(node)
        node = node[key]
    if holder is None:
        return raw
    if value:
        holder[key] = value[0]
    else:
        del holder[key]
    return json.dumps(root).replace(json.dumps(_DEEP), "[" * _DEPTH + "]" * _DEPTH).encode()


def _header_changed(raw: bytes, kind: str, rest: list[Any]) -> bytes:
    """Changes the header of a safetensors file."""
    try:
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        names = [name for name in header if name != "__metadata__"]
        name = names[rest[0] % len(names)]
        if kind == "header":
            header[name][rest[1]] = rest[2]
        else:
            header[rest[1]] = header.pop(name)
    except (struct.error, ValueError, ZeroDivisionError, TypeError, AttributeError, OverflowError):
        return raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def write(directory: Path, files: Files, links: dict[str, str]) -> None:
    """Writes files into an emptied directory; some of them become links, pipes or directories."""
    shutil.rmtree(directory, ignore_errors=True)
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if links.get(name) == "fifo":
            os.mkfifo(path)
        elif name in links:
            path.symlink_to(links[name])
        else:
            path.write_bytes(content)
