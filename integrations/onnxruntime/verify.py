"""Runs an exported file beside the packed model that it came from: what a user would find out too late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hq_plugin.integrations.onnxruntime.sessions import open_session


@torch.no_grad()
def difference(path: Path, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """Returns by how much the outputs of a file differ from the model's, each relative to its norm.

    Sums of 8-bit products are exact (`sessions.py`). Whole numbers, such as the places of the largest scores, are
    left out: the least rounding may change them.

    Args:
        path: The file.
        model: What it was made from, in eval mode and on the CPU, as its inputs are.
        args: Inputs.
        kwargs: Named inputs.

    Returns:
        The largest of the differences, 0 is equal; None where nobody can tell: ONNX Runtime is not installed, or
        inputs or outputs cannot be matched.
    """
    try:
        session = open_session(path)
    except ImportError:
        return None
    feed = _feed([entry.name for entry in session.get_inputs()], args, kwargs)
    if feed is None:
        return None
    expected = [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
    found = [torch.as_tensor(value) for value in session.run(None, feed)]
    # As many as both have: a causal model's cache follows in the file, and may be no tensor in PyTorch.
    pairs = list(zip(found, expected, strict=False))
    if any(mine.shape != theirs.shape for mine, theirs in pairs):
        return None
    return max((_apart(mine, theirs) for mine, theirs in pairs if theirs.is_floating_point()), default=None)


def _apart(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def _feed(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Returns what a session is fed: by order, or by name where the graph does not use all of the inputs."""
    values = [leaf.cpu().numpy() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if len(values) == len(names):
        return dict(zip(names, values, strict=True))
    if all(isinstance(kwargs.get(name), Tensor) for name in names):
        return {name: kwargs[name].cpu().numpy() for name in names}
    return None
