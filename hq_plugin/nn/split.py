"""`SplitEmbedding`: an embedding whose rows lie in several tables, each a layer with a width of its own.

A vocabulary is sorted by frequency, or nearly: by merges, by scores, by counts. Half of the weights of a sentence
encoder are rows that text seldom looks up, and one width for all of them is decided by those that it does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

#: Child that holds the tables: the embedding `words` becomes the layers `words.parts.0`, `words.parts.1` ...
PARTS = "parts"


class SplitEmbedding(nn.Module):
    """An embedding in several tables of as many rows each; the last may have fewer.

    Args:
        embedding: The embedding. Its rows are not copied.
        parts: Number of tables.

    Attributes:
        parts: The tables.
        rows: Rows of each table but the last.
    """

    def __init__(self, embedding: nn.Embedding, parts: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        weight = embedding._parameters["weight"]
        assert weight is not None
        self.rows = -(-self.num_embeddings // parts)
        self.parts = nn.ModuleList()
        for rows in weight.split(self.rows):
            part = nn.Embedding(len(rows), self.embedding_dim, device="meta")
            part.weight = nn.Parameter(rows.detach(), weight.requires_grad)
            self.parts.append(part)
        self.train(embedding.training)

    @property
    def weight(self) -> Tensor:
        """All rows, `[num_embeddings, embedding_dim]`."""
        tables: list[Any] = list(self.parts)
        return torch.cat([table.weight for table in tables])

    def forward(self, ids: Tensor) -> Tensor:
        """Looks rows up; ids `[...]`, result `[..., embedding_dim]`."""
        flat = ids.flatten()
        places = flat // self.rows
        if torch.compiler.is_compiling():
            found = self._everywhere(flat - places * self.rows, places)
        else:
            # A table is called even where nothing is looked up in it: whoever watches layers sees all of them.
            looked_up = torch.cat([part(flat[places == n] - n * self.rows) for n, part in enumerate(self.parts)])
            # Results lie table by table; back into the order of the ids.
            found = looked_up[torch.argsort(torch.argsort(places, stable=True))]
        return found.view(*ids.shape, self.embedding_dim)

    def _everywhere(self, local: Tensor, places: Tensor) -> Tensor:
        """Looks up in every table and keeps what is right: sizes do not hang on the ids, as a graph wants it."""
        found = self.parts[0](torch.where(places == 0, local, 0))
        for number, part in enumerate(self.parts[1:], start=1):
            here = places == number
            found = torch.where(here.unsqueeze(-1), part(torch.where(here, local, 0)), found)
        return found


def with_split_tables(model: nn.Module, layers: Iterable[str], *, inplace: bool = False) -> nn.Module:
    """Returns a copy of a model in which embeddings are split.

    Args:
        model: A model; without anything to split it is returned itself.
        layers: Names of tables, as `words.parts.3`, all of each embedding. Names of anything else are passed
            over, so that a whole policy may be given.
        inplace: Whether to change `model` itself.
    """
    modules = dict(model.named_modules())
    counts: dict[str, int] = {}
    for layer in layers:
        path, _, number = layer.rpartition(".")
        owner, _, child = path.rpartition(".")
        if child == PARTS and number.isdecimal() and isinstance(modules.get(owner), nn.Embedding):
            counts[owner] = max(counts.get(owner, 0), int(number) + 1)
    counts = {owner: count for owner, count in counts.items() if count <= len(modules[owner].weight)}  # type: ignore[arg-type]
    if not counts:
        return model
    model = model if inplace else copy.deepcopy(model)
    modules = dict(model.named_modules())
    split = {id(modules[owner]): SplitEmbedding(modules[owner], count) for owner, count in counts.items()}  # type: ignore[arg-type]
    for parent in list(model.modules()):
        for name, child_module in parent._modules.items():
            if child_module is not None and id(child_module) in split:
                parent._modules[name] = split[id(child_module)]
    return model


__all__ = ["PARTS", "SplitEmbedding", "with_split_tables"]
