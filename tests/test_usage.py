from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from hq_plugin import Config
from hq_plugin.batch import Batch
from hq_plugin.data import prepare_data
from hq_plugin.usage import rows_by_use


class Words(nn.Module):
    """Looks up what `look_up` makes of its input."""

    def __init__(self, look_up: Callable[[Tensor], Tensor] = lambda ids: ids) -> None:
        super().__init__()
        self.words, self.head, self.look_up, self.runs = nn.Embedding(10, 4), nn.Linear(4, 2), look_up, 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.runs += 1
        return self.head(self.words(self.look_up(input_ids)))


def batches(model: nn.Module, *inputs: dict[str, Tensor]) -> list[Batch]:
    data = prepare_data(list(inputs) + list(inputs[:1]), model, Config(effort="smoke"))
    return [*data.train]


def test_rows_are_sorted_by_look_ups_and_the_model_runs_once() -> None:
    model = Words().eval()
    ids = torch.tensor([[7, 7, 7, 2], [2, 4, 7, 7]])
    seen = [Batch((), {"input_ids": ids}, None, 2) for _ in range(40)]
    assert rows_by_use(model, ["words"], seen)["words"].tolist() == [7, 2, 4, 0, 1, 3, 5, 6, 8, 9]
    assert model.runs == 1
    assert rows_by_use(model, ["words"], [Batch((ids,), {}, None, 2)])["words"].tolist()[:3] == [7, 2, 4]
    assert rows_by_use(model, [], seen) == {}


def test_padding_is_not_counted() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    ids = torch.tensor([[7, 3, 0, 0], [3, 0, 0, 0]])
    kwargs = {"input_ids": ids, "attention_mask": mask}
    order = rows_by_use(Words().eval(), ["words"], [Batch((), kwargs, None, 2)])["words"].tolist()
    assert order[:3] == [3, 7, 0]


def test_what_is_computed_of_the_input_is_counted_by_running_the_model() -> None:
    model = Words(lambda ids: (ids + 1) % 10).eval()
    ids = torch.tensor([[7, 7, 7, 2]])
    order = rows_by_use(model, ["words"], [Batch((), {"input_ids": ids}, None, 1) for _ in range(40)])["words"]
    assert order.tolist()[:2] == [8, 3]
    assert 1 < model.runs < 40


def test_an_embedding_that_is_never_called_keeps_its_order() -> None:
    model = Words().eval()
    model.other = nn.Embedding(5, 2)
    ids = torch.tensor([[1, 2]])
    found = rows_by_use(model, ["words", "other"], [Batch((ids,), {}, None, 1) for _ in range(40)])
    assert found["other"].tolist() == [0, 1, 2, 3, 4]
    assert model.runs == 1


def test_no_more_is_read_than_is_of_use() -> None:
    model = Words(lambda ids: (ids + 1) % 10).eval()
    read = []

    def endless() -> Iterator[Batch]:
        while True:
            read.append(1)
            yield Batch((torch.tensor([[7, 2]]),), {}, None, 1)

    assert rows_by_use(model, ["words"], endless())["words"].tolist()[:2] == [3, 8]
    assert len(read) == model.runs + 1 < 40


def test_the_order_follows_from_the_data_alone() -> None:
    model = Words().eval()
    inputs = [
        {"input_ids": torch.randint(10, (4, 6), generator=torch.Generator().manual_seed(n))} for n in range(8)
    ]
    first, second = (rows_by_use(model, ["words"], batches(model, *inputs))["words"] for _ in range(2))
    assert torch.equal(first, second)
    assert sorted(first.tolist()) == list(range(10))
