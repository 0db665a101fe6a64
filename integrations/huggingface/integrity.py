"""A checksum of a folder that `save_pretrained` wrote: of config.json and of every tensor, however they are split.

transformers has none, and a flipped bit in a weight or a setting would load as another model in silence.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hq_plugin.errors import ArtifactError, HQWarning
from hq_plugin.storage import JSON_LIMIT, beside, write_text
from hq_plugin.untrusted import clean_errors, read_file

#: Where the checksum is, in config.json.
_SECTION, _KEY = "quantization_config", "checksum"


def add_checksum(folder: Path) -> None:
    """Writes the checksum of a folder into its config.json; of the model's files, since adapters may lie beside."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config[_SECTION][_KEY] = _checksum(config, sorted(map(str, folder.glob("model*.safetensors"))))
    write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")  # as transformers writes it


def start_check(files: Sequence[str]) -> Callable[[], None]:
    """Starts to compare the checksum of a folder with the one in its config.json, beside what loads it.

    Args:
        files: The safetensors files that are loaded; config.json lies beside them.

    Returns:
        What waits for the end of it, and raises an `ArtifactError` if the checksums differ.

    Raises:
        ArtifactError: config.json cannot be read.
    """
    place = Path(files[0]).parent / "config.json"
    if not place.exists():
        return lambda: None  # the configuration came from somewhere else
    try:
        raw = read_file(place, JSON_LIMIT)
    except OSError as error:
        raise ArtifactError(f"{place} cannot be read: {error}") from error
    with clean_errors(place):
        config = json.loads(raw)
        wanted = config[_SECTION].get(_KEY)
        if wanted is None:
            warnings.warn(
                f"{place} has no checksum: whether the files are damaged cannot be told. Saving the model again "
                "adds one.",
                HQWarning,
                stacklevel=2,
            )
            return lambda: None
    found = beside(lambda: _checksum(config, files))

    def finish() -> None:
        with clean_errors(place):
            differs = found() != wanted
        if differs:
            raise ArtifactError(
                f"{place.parent} is damaged, or was edited: its checksum is not that of config.json and the "
                f"tensors. Copy it again; if the edit was meant, delete {_KEY!r} under {_SECTION!r} in config.json."
            )

    return finish


def _checksum(config: dict[str, Any], files: Sequence[str]) -> str:
    """Returns a checksum that does not hang on how tensors are split over files, or on the text's layout."""
    section = {name: value for name, value in config[_SECTION].items() if name != _KEY}
    text = json.dumps({**config, _SECTION: section}, sort_keys=True, separators=(",", ":"))
    parts = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, not a mapping
                tensor = tensors.get_tensor(name)
                content = tensor.reshape(-1).contiguous().view(torch.uint8).numpy()
                parts[name] = [str(tensor.dtype), list(tensor.shape), hashlib.sha256(content).hexdigest()]
    return hashlib.sha256((text + json.dumps(parts, sort_keys=True)).encode()).hexdigest()


__all__ = ["add_checksum", "start_check"]
