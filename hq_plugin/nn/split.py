"""`SplitEmbedding`: an embedding whose rows lie in several tables, each a layer with a width of its own.

Half of the weights of a sentence encoder are rows that text seldom looks up, and one width for all of them is
decided by those that it does. So rows lie in the tables by how often they are used, and the tables grow: use falls
as a power of the rank (Zipf), and a table of few rows takes wide integers for next to nothing.

Tables may be split into columns as well, each block of them a layer, once rows are turned onto their principal
axes (`principal_axes`): the first columns vary most and take wide integers, the last ones of seldom used rows none
at all. `basis` turns back what was looked up. (Transform coding: Goyal, IEEE Signal Processing Magazine 18(5),
2001.)
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hq_plugin.nn.replacing import replace_modules

#: Child that holds the tables: the embedding `words` becomes the layers `words.parts.0`, `words.parts.1` ..., or
#: `words.parts.0.0`, `words.parts.0.1` ... where tables have several blocks of columns.
PARTS = "parts"
#: Child that turns looked-up rows back from their principal axes.
BASIS = "basis"
#: Each table has so many times the rows of the one before it (docs/experiments.md compares ratios and counts).
RATIO = 1.5


def table_rows(rows: int, parts: int) -> list[int]:
    """Returns how many rows each of some tables has, at least one, together `rows`."""
    whole, ends = RATIO**parts - 1, [0]
    for number in range(1, parts):
        end = max(round(rows * (RATIO**number - 1) / whole), ends[-1] + 1)
        ends.append(min(end, rows - parts + number))
    return [stop - start for start, stop in zip(ends, [*ends[1:], rows], strict=True)]


def principal_axes(rows: Tensor) -> Tensor:
    """Returns the axes along which rows vary most, one after the other, orthonormal `[width, width]`, one a column.

    Args:
        rows: Float, `[rows, width]`.
    """
    wide = rows.detach().double().cpu()  # not every device has double precision
    axes = torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return (axes * largest.sign()).to(rows)


class Columns(nn.ModuleList):
    """One table in blocks of columns, each an embedding of its own."""

    @property
    def weight(self) -> Tensor:
        """The whole table, `[rows, width]`."""
        blocks: list[Any] = list(self)
        return torch.cat([block.weight for block in blocks], dim=1)

    def forward(self, ids: Tensor) -> Tensor:
        """Looks rows up in every block; ids `[...]`, result `[..., width]`."""
        return torch.cat([block(ids) for block in self], dim=-1)


class SplitEmbedding(nn.Module):
    """An embedding in several tables, each larger than the one before it (`table_rows`).

    Args:
        embedding: The embedding. Without `by_use` its rows are not copied.
        parts: Number of tables.
        by_use: Numbers of the rows in the order in which they lie in the tables, int64 `[num_embeddings]`; None
            leaves them in theirs.
        columns: Blocks of columns of each table.
        axes: What rows are turned onto, orthonormal `[width, width]`, where there are several blocks; None leaves
            the values of tables and basis open, until a state is loaded.

    Attributes:
        parts: The tables.
        basis: What turns looked-up rows back, where there are several blocks of columns.
        original: By what the rows are known that were turned, where whoever split them wrote it down.
        places: Where each row lies in the tables, one after the other: a number in as many bytes as it needs, the
            lowest first, uint8 `[num_embeddings, bytes]`.
        sizes: Rows of each table.
        starts: Place of the first row of each table.
    """

    places: Tensor

    def __init__(
        self,
        embedding: nn.Embedding,
        parts: int,
        by_use: Tensor | None = None,
        columns: int = 1,
        axes: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.original = ""
        self.padding_idx = embedding.padding_idx
        weight = embedding._parameters["weight"]
        assert weight is not None
        self.sizes = table_rows(self.num_embeddings, parts)
        self.starts = [sum(self.sizes[:number]) for number in range(parts)]
        places = torch.arange(self.num_embeddings, device=weight.device)
        if by_use is not None:
            by_use = by_use.to(weight.device)
            places = torch.empty_like(by_use).scatter_(0, by_use, places)
            weight = nn.Parameter(weight.detach()[by_use], weight.requires_grad)
        trains, values = weight.requires_grad, weight.detach()
        self.register_buffer("places", _bytes_of(places))
        self.basis: nn.Linear | None = None
        if columns > 1:
            self.basis = nn.Linear(self.embedding_dim, self.embedding_dim, bias=False, device="meta")
            given = values.new_empty(self.basis.weight.shape) if axes is None else axes.to(values)
            self.basis.weight = nn.Parameter(given, trains)
            values = values if axes is None else values @ given
        self.parts = nn.ModuleList()
        for rows in values.split(self.sizes):
            blocks = [_table(block, trains) for block in rows.tensor_split(columns, dim=1)]
            self.parts.append(Columns(blocks) if columns > 1 else blocks[0])
        self.train(embedding.training)

    @property
    def weight(self) -> Tensor:
        """All rows in the embedding's order, `[num_embeddings, embedding_dim]`."""
        tables: list[Any] = list(self.parts)
        rows = torch.cat([table.weight for table in tables])[_numbers(self.places)]
        return rows if self.basis is None else rows @ self.basis.weight.T

    def forward(self, ids: Tensor) -> Tensor:
        """Looks rows up; ids `[...]`, result `[..., embedding_dim]`."""
        flat = _numbers(self.places.index_select(0, ids.flatten()))
        if torch.compiler.is_compiling():
            found = self._everywhere(flat)
        else:
            tables = torch.bucketize(flat, torch.tensor(self.starts[1:], device=flat.device), right=True)
            # A table is called even where nothing is looked up in it: whoever watches layers sees all of them.
            numbered = enumerate(zip(self.parts, self.starts, strict=True))
            looked_up = torch.cat([part(flat[tables == n] - start) for n, (part, start) in numbered])
            # Results lie table by table; back into the order of the ids.
            found = looked_up[torch.argsort(torch.argsort(tables, stable=True))]
        found = found.view(*ids.shape, self.embedding_dim)
        return found if self.basis is None else self.basis(found)

    def _everywhere(self, flat: Tensor) -> Tensor:
        """Looks up in every table and keeps what is right: sizes do not hang on the places, as a graph wants it."""
        if len(self.parts) == 1:
            return self.parts[0](flat)  # type: ignore[no-any-return]
        found = self.parts[0](torch.where(flat < self.starts[1], flat, 0))
        for part, start, size in zip(self.parts[1:], self.starts[1:], self.sizes[1:], strict=True):
            # Of the tables that begin at a place or before it, the last one holds it.
            local = torch.where(flat >= start, flat - start, 0).clamp(max=size - 1)
            found = torch.where((flat >= start).unsqueeze(-1), part(local), found)
        return found


def _table(rows: Tensor, trains: bool) -> nn.Embedding:
    table = nn.Embedding(rows.shape[0], rows.shape[1], device="meta")
    table.weight = nn.Parameter(rows.contiguous(), trains)
    return table


def _bytes_of(places: Tensor) -> Tensor:
    """Returns numbers below their count as bytes, `[count, bytes]`: no other short type is known everywhere."""
    count = max(-(-(len(places) - 1).bit_length() // 8), 1)
    return torch.stack([places >> 8 * byte & 255 for byte in range(count)], dim=1).to(torch.uint8)


def _numbers(places: Tensor) -> Tensor:
    """Returns what `_bytes_of` wrote, int64 `[count]`."""
    found = places[:, 0].long()
    for byte in range(1, places.shape[1]):
        found = found + places[:, byte].long() * 256**byte
    return found


def with_split_tables(
    model: nn.Module,
    layers: Iterable[str],
    *,
    by_use: Mapping[str, Tensor] | None = None,
    axes: Mapping[str, Tensor] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Returns a copy of a model in which embeddings are split.

    Args:
        model: A model; without anything to split it is returned itself.
        layers: Names of tables, as `words.parts.3` or `words.parts.3.1`, all of each embedding. Names of anything
            else are passed over, so that a whole policy may be given.
        by_use: Rows of embeddings, by name, in the order in which they lie in the tables; those of others stay in
            theirs, until a state is loaded.
        axes: What rows of embeddings are turned onto, by name, where their tables have several blocks of columns.
        inplace: Whether to change `model` itself.
    """
    modules = dict(model.named_modules())
    counts: dict[str, tuple[int, int]] = {}
    for owner, table, column in filter(None, map(table_place, layers)):
        if isinstance(modules.get(owner), nn.Embedding):
            tables, columns = counts.get(owner, (0, 0))
            counts[owner] = max(tables, table + 1), max(columns, (column or 0) + 1)
    counts = {
        owner: (tables, columns)
        for owner, (tables, columns) in counts.items()
        if tables <= modules[owner].num_embeddings and columns <= modules[owner].embedding_dim  # type: ignore[operator]
    }
    if not counts:
        return model
    model = model if inplace else copy.deepcopy(model)
    modules = dict(model.named_modules())
    split = {
        id(modules[owner]): SplitEmbedding(
            modules[owner],  # type: ignore[arg-type]
            tables,
            (by_use or {}).get(owner),
            columns,
            (axes or {}).get(owner),
        )
        for owner, (tables, columns) in counts.items()
    }
    return replace_modules(model, split)


def table_place(layer: str) -> tuple[str, int, int | None] | None:
    """Returns the embedding that a table is part of, the table's number and that of its block of columns."""
    found = re.fullmatch(rf"(.+)\.{PARTS}\.(\d+)(?:\.(\d+))?", layer, re.ASCII)
    return None if found is None else (found[1], int(found[2]), None if found[3] is None else int(found[3]))


def tables_of(layers: Mapping[str, Any]) -> list[str]:
    """Returns those layers, by their names, that are a table of a split embedding or turn back its rows."""
    owners = {place[0] for layer in layers if (place := table_place(layer)) is not None}
    return [name for name in layers if table_place(name) or name.removesuffix(f".{BASIS}") in owners]


def same_columns(layer: str) -> str:
    """Returns one name for all tables of an embedding that hold the same columns; of other layers their own."""
    place = table_place(layer)
    if place is None:
        return layer
    return place[0] if place[2] is None else f"{place[0]}.{PARTS}.*.{place[2]}"


def saved_orders(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the orders of rows in a state, `by_use` of `with_split_tables`.

    Raises:
        ValueError: The places of an embedding's rows are not each number once.
    """
    orders = {}
    for name, places in state.items():
        owner, _, last = name.rpartition(".")
        if last == "places" and any(key.startswith(f"{owner}.{PARTS}.") for key in state):
            numbers = _numbers(places)
            order = torch.argsort(numbers)
            if not torch.equal(numbers[order], torch.arange(len(places))):
                raise ValueError(f"the places of the rows of {owner} are not each number once")
            orders[owner] = order
    return orders


def split_embeddings(model: nn.Module) -> dict[str, SplitEmbedding]:
    """Returns the split embeddings of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SplitEmbedding)}


def place_bytes(model: nn.Module) -> dict[str, int]:
    """Returns the bytes that say where the rows of each table are, by the table's name, or its first block's."""
    return {
        f"{name}.{PARTS}.{number}{'' if module.basis is None else '.0'}": size * module.places.shape[1]
        for name, module in split_embeddings(model).items()
        for number, size in enumerate(module.sizes)
    }


__all__ = [
    "BASIS",
    "PARTS",
    "Columns",
    "SplitEmbedding",
    "place_bytes",
    "principal_axes",
    "same_columns",
    "saved_orders",
    "split_embeddings",
    "table_place",
    "table_rows",
    "tables_of",
    "with_split_tables",
]
