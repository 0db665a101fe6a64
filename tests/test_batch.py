"""One batch: its inputs, its labels, and what of an output counts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hq_plugin import DataError
from hq_plugin.batch import Batch
from hq_plugin.data import prepare_data
from tests.test_data import CONFIG, Named, One, Two, X, Y


class NeedsY(nn.Module):
    def forward(self, x: Tensor, y: Tensor, label: Tensor | None = None) -> Tensor:
        return x + y


@pytest.mark.parametrize(
    ("model", "raw", "args", "kwargs", "labels"),
    [
        (One(), X, 1, [], False),
        (One(), (X,), 1, [], False),
        (One(), (X, Y), 1, [], True),
        (One(), [X, Y], 1, [], True),
        (Two(), (X, X), 2, [], False),
        (Two(), (X, X, Y), 2, [], True),
        (Two(), (X, Y), 2, [], False),
        (Named(), {"input_ids": X, "attention_mask": X}, 0, ["input_ids", "attention_mask"], False),
        (Named(), {"input_ids": X, "attention_mask": X, "labels": Y}, 0, ["input_ids", "attention_mask"], True),
        (One(), (X, X), 1, [], False),
        (NeedsY(), {"x": X, "y": X}, 0, ["x", "y"], False),
        (NeedsY(), {"x": X, "y": X, "label": Y}, 0, ["x", "y"], True),
    ],
)
def test_inputs_and_labels_are_told_apart(model, raw, args: int, kwargs: list[str], labels: bool) -> None:  # type: ignore[no-untyped-def]
    batch = prepare_data([raw], model, CONFIG).holdout[0]
    assert (len(batch.args), list(batch.kwargs), batch.labels is not None) == (args, kwargs, labels)
    assert batch.size == 200
    batch.run(model)


def test_the_first_samples_of_a_batch() -> None:
    batch = prepare_data([(X, Y)], One(), CONFIG).holdout[0].take(7)
    assert batch.labels is not None
    assert (batch.size, batch.args[0].shape, batch.labels.shape) == (7, (7, 1), (7,))
    assert batch.take(100) is batch


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
    assert torch.equal(whole["logits"], x)


def test_types_that_a_model_does_not_take_are_named() -> None:
    batch = Batch((torch.ones(2, 3, dtype=torch.uint8),), {}, None, 2)
    with pytest.raises(DataError, match="the types uint8"):
        batch.run(nn.Linear(3, 2))


def test_what_a_model_asks_of_its_input_in_vain_is_told_with_the_input() -> None:
    class Targets(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.items()  # type: ignore[operator]

    with pytest.raises(DataError, match=r"shapes \{0: \(2, 3\)\}.*no attribute 'items'"):
        Batch((torch.ones(2, 3),), {}, None, 2).run(Targets())
