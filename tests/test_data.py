from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hq_plugin import Config, DataError
from hq_plugin.batch import Batch
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


@pytest.mark.parametrize(
    ("model", "raw", "args", "kwargs", "labels"),
    [
        (One(), X, 1, [], False),
        (One(), (X,), 1, [], False),
        (One(), (X, Y), 1, [], True),
        (One(), [X, Y], 1, [], True),
        (Two(), (X, X), 2, [], False),
        (Two(), (X, X, Y), 2, [], True),
        (Named(), {"input_ids": X, "attention_mask": X}, 0, ["input_ids", "attention_mask"], False),
        (Named(), {"input_ids": X, "attention_mask": X, "labels": Y}, 0, ["input_ids", "attention_mask"], True),
        (One(), (X, X), 1, [], False),
    ],
)
def test_inputs_and_labels_are_told_apart(model, raw, args: int, kwargs: list[str], labels: bool) -> None:  # type: ignore[no-untyped-def]
    batch = prepare_data([raw], model, CONFIG).holdout[0]
    assert (len(batch.args), list(batch.kwargs), batch.labels is not None) == (args, kwargs, labels)
    assert batch.size == 200
    batch.run(model)


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


def test_the_first_samples_of_a_batch() -> None:
    batch = prepare_data([(X, Y)], One(), CONFIG).holdout[0].take(7)
    assert batch.labels is not None
    assert (batch.size, batch.args[0].shape, batch.labels.shape) == (7, (7, 1), (7,))
    assert batch.take(100) is batch


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


def test_outputs_of_padded_sequences_keep_the_tokens_that_count() -> None:
    class Tokens(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor) -> dict[str, Any]:
            return {"logits": x, "pooled": x[:, 0], "states": (x, x[:1])}

    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = Batch((x,), {"attention_mask": mask}, None, 2).run(Tokens())
    assert torch.equal(found["logits"], torch.cat([x[0, :2], x[1]]))
    assert torch.equal(found["pooled"], x[:, 0])
    assert torch.equal(found["states"][0], found["logits"])
    assert torch.equal(found["states"][1], x[:1])
    whole = Batch((x,), {"attention_mask": torch.ones_like(mask)}, None, 2).run(Tokens())
    assert whole["logits"] is x


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


def test_types_that_a_model_does_not_take_are_named() -> None:
    batch = Batch((torch.ones(2, 3, dtype=torch.uint8),), {}, None, 2)
    with pytest.raises(DataError, match="the types uint8"):
        batch.run(nn.Linear(3, 2))
