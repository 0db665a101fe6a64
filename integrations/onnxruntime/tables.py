"""Tables of a split embedding that are stored alike, as one: a lookup of every id in each table takes long."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from hq_plugin.integrations.onnxruntime.layers import IntegerEmbedding, LeftOutEmbedding
from hq_plugin.integrations.onnxruntime.readable import Readable
from hq_plugin.nn.split import Columns, SplitEmbedding, split_embeddings


class _Tables(Readable):
    """Mixin of what stands for several tables.

    Attributes:
        tables: The tables, one after the other.
    """

    tables: nn.ModuleList

    @property
    def weight(self) -> Tensor:
        """The float weights, for code that reads them."""
        tables: list[Any] = list(self.tables)
        return torch.cat([table.weight for table in tables])

    def note_run(self) -> None:
        """Remembers that the tables ran."""
        for table in self.tables:
            assert isinstance(table, Readable)
            table.note_run()


class MergedEmbedding(_Tables, IntegerEmbedding):
    """Tables of one storage width, one after the other.

    Args:
        tables: The tables; widths of their integers may differ, and have room in the storage width of all.
    """

    def __init__(self, tables: list[IntegerEmbedding]) -> None:
        nn.Module.__init__(self)
        first: Any = tables[0]
        self.width, self._name, self._dtype = first.width, first._name, first._dtype
        self.embedding_dim = first.embedding_dim
        self.tables = nn.ModuleList(tables)
        for name in (self._name, "scale", "offset"):
            parts = [getattr(table, name) for table in tables]
            self.register_buffer(name, None if parts[0] is None else torch.cat(parts))


class LeftOutTables(_Tables, LeftOutEmbedding):
    """Tables whose values are all 0."""

    def __init__(self, tables: list[LeftOutEmbedding]) -> None:
        nn.Module.__init__(self)
        self.embedding_dim, self.weight_dtype = tables[0].embedding_dim, tables[0].weight_dtype
        self.tables = nn.ModuleList(tables)


def merge_tables(model: nn.Module) -> None:
    """Joins neighbouring tables of split embeddings that are stored alike, in place.

    Args:
        model: A model in its exported form.
    """
    for whole in split_embeddings(model).values():
        _merge(whole)


def _merge(whole: SplitEmbedding) -> None:
    rows = [(list(part) if isinstance(part, Columns) else [part], part) for part in whole.parts]
    if not all(isinstance(block, (IntegerEmbedding, LeftOutEmbedding)) for blocks, _ in rows for block in blocks):
        return
    parts, sizes, sized = [], [], iter(whole.sizes)
    for _, alike in itertools.groupby(rows, key=lambda row: [_kind(block) for block in row[0]]):
        tables = list(alike)
        sizes.append(sum(itertools.islice(sized, len(tables))))
        merged = [_joined(list(blocks)) for blocks in zip(*(blocks for blocks, _ in tables), strict=True)]
        parts.append(Columns(merged) if isinstance(tables[0][1], Columns) else merged[0])
    whole.parts, whole.sizes = nn.ModuleList(parts), sizes
    whole.starts = [sum(sizes[:number]) for number in range(len(sizes))]


def _kind(block: Any) -> tuple[Any, ...]:
    """Returns what tables must have in common to be one."""
    if isinstance(block, LeftOutEmbedding):
        return (None,)
    return block.width, block.scale.shape[1], block.offset is None


def _joined(blocks: list[Any]) -> nn.Module:
    if len(blocks) == 1:
        return blocks[0]  # type: ignore[no-any-return]
    return LeftOutTables(blocks) if isinstance(blocks[0], LeftOutEmbedding) else MergedEmbedding(blocks)
