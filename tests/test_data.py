from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hq_plugin import Config, DataError
from hq_plugin.data import Data, prepare_data

CONFIG = Config(effort="smoke", batch_size=16)
X, Y = torch.arange(200.0).reshape(200, 1), torch.arange(200) % 3


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Named(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return input_ids * attention_mask


def values(batches) -> set[float]:  # type: ignore[no-untyped-def]
    return {float(v) for batch in batches for v in batch.args[0].flatten()}


def test_a_dataset_is_split_without_overlap() -> None:
    data = prepare_data(TensorDataset(X, Y), One(), CONFIG)
    held, trained = values(data.holdout), values(data.train)
    assert len(held) == 50
    assert not held & trained
    assert all(batch.size == 16 for batch in data.train)
    assert torch.equal(data.holdout[0].labels, data.holdout[0].args[0].flatten().long() % 3)


def test_a_loader_keeps_its_batch_size_and_collation() -> None:
    loader = DataLoader(
        TensorDataset(X, Y), batch_size=10, collate_fn=lambda rows: torch.stack([r[0] for r in rows]) + 1000
    )
    data = prepare_data(loader, One(), CONFIG)
    assert min(values(data.train)) >= 1000
    assert {batch.size for batch in data.train} == {10}
    assert not values(data.holdout) & values(data.train)


def test_a_list_of_batches_is_split_without_overlap() -> None:
    data = prepare_data(list(X.split(10)), One(), CONFIG)
    assert not values(data.holdout) & values(data.train)
    assert values(data.holdout) | values(data.train) == set(range(200))


def test_one_batch_is_shared() -> None:
    data = prepare_data([X], One(), CONFIG)
    assert data.shared
    assert values(data.holdout) == values(data.train)


def test_the_split_follows_the_seed() -> None:
    def held(seed: int) -> set[float]:
        return values(prepare_data(TensorDataset(X, Y), One(), Config(effort="smoke", seed=seed)).holdout)

    assert held(1) == held(1)
    assert held(1) != held(2)


def test_prepare_batch_takes_over() -> None:
    config = Config(effort="smoke", prepare_batch=lambda raw: ((raw["image"],), {}, raw["kind"]))
    batch = prepare_data([{"image": X, "kind": Y}], One(), config).holdout[0]
    assert torch.equal(batch.labels, Y)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "empty"),
        (TensorDataset(X[:0]), "empty"),
        ((x for x in X.split(10)), "one-shot"),
        (X, "not batches"),
        ("file.csv", "not batches"),
        (3, "not batches"),
        ([torch.full((4, 1), float("nan"))], "NaN"),
        ([torch.full((4, 1), float("inf"))], "NaN"),
        ([X[:0]], "no sample"),
        (["text"], "holds no tensor"),
        ([X.to("meta")], "meta device"),
    ],
)
def test_bad_data(data: object, says: str) -> None:
    with pytest.raises(DataError, match=says):
        prepare_data(data, One(), CONFIG)


def test_bad_values_later_are_found_where_they_are_read() -> None:
    bad = X.clone()
    bad[190] = float("nan")
    data = prepare_data(list(bad.split(10)), One(), CONFIG)
    with pytest.raises(DataError, match="NaN"):
        list(data.train)


def test_training_goes_on_forever_with_new_epochs() -> None:
    data = prepare_data(TensorDataset(X, Y), One(), CONFIG)
    stream = data.forever()
    epoch = len(list(data.train))
    first = [next(stream) for _ in range(epoch)]
    second = [next(stream) for _ in range(epoch)]
    assert not torch.equal(first[0].args[0], second[0].args[0])


def test_an_epoch_s_order_hangs_on_nothing_but_the_seed() -> None:
    def first(data: Data, count: int) -> list[torch.Tensor]:
        return [batch.args[0] for batch in islice(data.forever(), count)]

    def prepare(seed: int) -> Data:
        return prepare_data(TensorDataset(X, Y), nn.Linear(1, 3), replace(CONFIG, seed=seed))

    fresh, used = prepare(0), prepare(0)
    list(used.train)
    next(iter(used.train))
    epochs = 2 * len(list(fresh.train))
    assert all(map(torch.equal, first(fresh, epochs), first(used, epochs)))
    order = first(fresh, epochs)
    assert not all(map(torch.equal, order[: epochs // 2], order[epochs // 2 :]))
    assert not all(map(torch.equal, order, first(prepare(1), epochs)))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (X.numpy(), r"split\(64\)"),
        ([X.numpy()] * 4, "torch.from_numpy"),
        ([(X.numpy(), Y.numpy())] * 4, "torch.from_numpy"),
        ("photographs", "ImageFolder"),
    ],
)
def test_what_only_looks_like_batches_gets_a_hint(data: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        prepare_data(data, One(), CONFIG)
