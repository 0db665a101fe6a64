"""How often data looks up each row of an embedding, and the rows in that order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from hq_plugin.batch import Batch
from hq_plugin.probe import first_inputs

#: Batches in which look-ups are counted at most: of their inputs alone, or where the model has to run for them.
_COUNTED, _COUNTED_RUNNING = 1024, 16


@torch.no_grad()
def rows_by_use(model: nn.Module, embeddings: Sequence[str], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Sorts the rows of embeddings by how often data looks them up.

    Most embeddings look up an input of the model as it is: the first batch shows which, and of the others that
    input alone is read. For the rest the model runs on a few batches. What padding looks up is not counted.

    Args:
        model: The float model, in eval mode.
        embeddings: Names of its embeddings.
        batches: The data.

    Returns:
        For each embedding the numbers of its rows, int64 `[rows]`, the most used first; rows that are used alike
        stay in their order.
    """
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in embeddings}
    counts = {name: torch.zeros(layer.num_embeddings, dtype=torch.int64) for name, layer in layers.items()}
    if not layers:
        return {}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sources: dict[str, str | int | None] | None = None
    for number, batch in enumerate(islice(batches, _COUNTED)):
        running = number < _COUNTED_RUNNING
        if sources is None or (running and None in sources.values()):
            seen = first_inputs(layers, lambda batch=batch: batch.to(device).run(model))  # type: ignore[misc]
            if sources is None:  # what the first batch does not call is not looked at again
                sources = {name: _source(batch, ids) for name, ids in seen.items()}
        if not running and not any(source is not None for source in sources.values()):
            break
        for name, source in sources.items():
            ids = seen.get(name) if source is None and running else _input(batch, source)
            if ids is not None:
                rows = counts[name]
                rows += torch.bincount(_kept(batch, ids.cpu()), minlength=len(rows))[: len(rows)]
    return {name: torch.argsort(rows, descending=True, stable=True) for name, rows in counts.items()}


def _source(batch: Batch, ids: Tensor | None) -> str | int | None:
    """Returns the name or place of the input that is looked up, or None where it is none of them."""
    inputs: list[tuple[str | int, Any]] = [*batch.kwargs.items(), *enumerate(batch.args)]
    for key, value in inputs:
        alike = ids is not None and isinstance(value, Tensor) and value.shape == ids.shape
        if alike and not value.is_floating_point() and torch.equal(value.cpu().long(), ids.cpu().long()):  # type: ignore[union-attr]
            return key
    return None


def _input(batch: Batch, source: str | int | None) -> Tensor | None:
    if isinstance(source, int):
        value = batch.args[source] if source < len(batch.args) else None
    else:
        value = None if source is None else batch.kwargs.get(source)
    return value if isinstance(value, Tensor) else None


def _kept(batch: Batch, ids: Tensor) -> Tensor:
    """Returns ids `[lookups]` without those of padding."""
    kept = batch.kept
    ids = ids[kept.cpu()] if kept is not None and kept.shape == ids.shape else ids.flatten()
    return ids[ids >= 0].long()
