from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

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


def test_a_loader_that_changes_its_batches_is_read_as_it_is() -> None:
    class Scaling(DataLoader[Any]):
        def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
            for x, y in super().__iter__():
                yield x + 1000, y

    data = prepare_data(Scaling(TensorDataset(X, Y), batch_size=10), One(), CONFIG)
    assert min(values(data.train) | values(data.holdout)) >= 1000
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


def test_prepare_batch_must_give_three_things() -> None:
    with pytest.raises(DataError, match="prepare_batch returned a Tensor"):
        prepare_data([X], One(), replace(CONFIG, prepare_batch=lambda raw: raw))  # type: ignore[arg-type, return-value]


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
        ([torch.tensor([[1.0], [2.0], [float("nan")]])], "sample 2 of an input of shape"),
        ([torch.tensor([1.0, float("inf")])], "sample 1 of an input of shape"),
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


def test_one_sample_that_is_left_over_is_not_trained_on_but_single_samples_are() -> None:
    x = torch.arange(26.0).reshape(13, 2)
    stream = prepare_data(list(x.split(4)), One(), CONFIG).forever()
    assert {next(stream).size for _ in range(12)} == {4}
    stream = prepare_data(list(x.split(1)), One(), CONFIG).forever()
    assert {next(stream).size for _ in range(12)} == {1}


def test_what_is_left_over_has_two_samples_for_each_process() -> None:
    data = prepare_data(list(torch.arange(22.0).reshape(11, 2).split(4)), One(), CONFIG)
    assert {batch.size for batch in islice(data.forever(4), 6)} == {4}
    assert {batch.size for batch in islice(data.forever(), 6)} == {4, 3}
    assert {batch.size for batch in islice(data.forever(8), 6)} == {4, 3}, "no batch has as many"


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


class Recorded(Dataset[Tensor]):
    """Notes which samples are read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> Tensor:
        self.read.append(index)
        return X[index]


def test_samples_that_a_sampler_leaves_out_are_never_read() -> None:
    source = Recorded()
    loader = DataLoader(source, batch_size=8, sampler=SubsetRandomSampler(range(100)))
    data = prepare_data(loader, One(), CONFIG)
    held, trained = values(data.holdout), values(data.train)
    assert held | trained <= set(map(float, range(100)))
    assert not held & trained
    assert max(source.read) < 100
    assert len(held) == 25


def test_samples_are_trained_on_as_often_as_a_sampler_draws_them() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [1.0] * 100 + [9.0] * 100
    sampler = WeightedRandomSampler(weights, 1000, generator=generator)
    data = prepare_data(DataLoader(Recorded(), batch_size=8, sampler=sampler), One(), CONFIG)
    seen = [float(v) for batch in data.train for v in batch.args[0].flatten()]
    assert not set(seen) & values(data.holdout)
    assert 0.8 < sum(value >= 100 for value in seen) / len(seen) < 0.97


@pytest.mark.parametrize("sampler", [RandomSampler, lambda data: DistributedSampler(data, 2, 0)])
def test_every_process_splits_all_samples(sampler: Any) -> None:
    source = Recorded()
    data = prepare_data(DataLoader(source, batch_size=8, sampler=sampler(source)), One(), CONFIG)
    assert len(values(data.holdout)) == 50
    assert len(values(data.train)) == 144, "150, without the last, smaller batch"


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        yield from X


def test_a_stream_has_no_length() -> None:
    data = prepare_data(DataLoader(Stream(), batch_size=10), One(), CONFIG)
    assert not values(data.holdout) & values(data.train)
    assert values(data.holdout) | values(data.train) == set(range(200))
    assert not data.shared


def test_a_short_stream_still_holds_something_out() -> None:
    class Few:
        def __iter__(self) -> Any:
            return iter(X[:40].split(10))

    data = prepare_data(Few(), One(), replace(CONFIG, holdout=512))
    assert (len(values(data.holdout)), len(values(data.train)), data.shared) == (10, 30, False)


def test_a_dataset_without_a_length_says_so() -> None:
    class Endless(Dataset[Tensor]):
        def __getitem__(self, index: int) -> Tensor:
            return X[0]

    with pytest.raises(DataError, match="Endless has no length"):
        prepare_data(Endless(), One(), CONFIG)


class Buckets:
    """A batch sampler that draws other batches for each epoch."""

    def __init__(self) -> None:
        self.epochs = 0

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[list[int]]:
        self.epochs += 1
        order = torch.randperm(200, generator=torch.Generator().manual_seed(self.epochs))
        return iter([batch.tolist() for batch in order.split(10)])


def test_a_batch_sampler_that_shuffles_leaks_nothing_that_is_held_out() -> None:
    data = prepare_data(DataLoader(TensorDataset(X, Y), batch_sampler=Buckets()), One(), CONFIG)  # type: ignore[arg-type]
    held = {float(value) for batch in data.holdout for value in batch.args[0]}
    assert len(held) == 50
    assert not data.shared
    epochs = [[batch.args[0].flatten().tolist() for batch in data.train] for _ in range(3)]
    for batches in epochs:
        assert {value for batch in batches for value in batch} == {float(value) for value in X} - held
    assert epochs[0] != epochs[1]


def test_a_batch_sampler_of_nothing_says_so() -> None:
    with pytest.raises(DataError, match="its batch sampler draws no batch"):
        prepare_data(DataLoader(TensorDataset(X, Y), batch_sampler=[]), One(), CONFIG)


class LabelledStream(IterableDataset):
    """Samples, each with a label of its own."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter((x, int(y)) for x, y in zip(X, Y, strict=True))


def test_a_stream_of_samples_is_put_into_batches() -> None:
    data = prepare_data(LabelledStream(), nn.Linear(1, 3), CONFIG)
    batch = data.holdout[0]
    assert batch.args[0].shape == (CONFIG.filled().batch_size, *X.shape[1:])
    assert batch.labels is not None
