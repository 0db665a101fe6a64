"""What a model's configuration may not ask for when it comes from a file: downloads, other files, endless lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants

from hq_plugin.errors import ArtifactError

#: Keys by which transformers and timm read files, and those by which they fetch weights that ours replace anyway.
_REFUSED, _OFF = ("checkpoint_path", "cache_dir"), ("use_pretrained_backbone", "pretrained")
#: How names of places begin, from which timm builds a model.
_PLACES = ("hf-hub:", "hf_hub:", "local-dir:")
#: Classes that a configuration may have without names for them: transformers makes these up one by one.
_MOST_LABELS = 10_000


def checked(values: Any) -> Any:
    """Returns a copy of a configuration, and of all that is in it, that fetches no weights.

    Raises:
        ArtifactError: It asks for what no saved model does.
    """
    if isinstance(values, list):
        return [checked(value) for value in values]
    if isinstance(values, str) and values.lower().startswith(_PLACES):
        raise ArtifactError(f"The saved configuration names a place, {values[:80]!r}, which no saved model does.")
    if not isinstance(values, Mapping):
        return values
    if refused := sorted(key for key in _REFUSED if values.get(key)):
        raise ArtifactError(f"The saved configuration asks for {', '.join(refused)}: no saved model does.")
    for key in ("num_labels", "num_classes"):
        count = values.get(key)
        if isinstance(count, int) and count > _MOST_LABELS:
            raise ArtifactError(f"The saved configuration has {key}={count:,}, and no names for them.")
    return {key: False if key in _OFF and value else checked(value) for key, value in values.items()}


@contextmanager
def offline() -> Iterator[None]:
    """Inside, nothing is asked of the hub: what is on this machine already may be read."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
