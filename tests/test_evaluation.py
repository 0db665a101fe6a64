from typing import Any

import pytest
import torch
from torch import nn

from hq_plugin.config import Config
from hq_plugin.errors import DataError
from hq_plugin.evaluation import accuracy, perplexity


def test_accuracy_without_labels_says_how_a_folder_gives_them() -> None:
    with pytest.raises(DataError, match="a folder for each class"):
        accuracy(nn.Linear(4, 3), [torch.zeros(2, 4)], Config())


def test_accuracy_counts_what_is_right() -> None:
    inputs = torch.eye(3)
    assert accuracy(nn.Identity(), [(inputs, torch.tensor([0, 1, 1]))], Config()) == (2 / 3, 3)


def test_labels_in_a_column_count_once_and_what_is_negative_is_none() -> None:
    inputs = torch.eye(3)
    model = nn.Identity()
    column = accuracy(model, [(inputs, inputs, torch.tensor([[0], [1], [1]]))], Config(prepare_batch=third))
    assert column == (2 / 3, 3)
    assert accuracy(model, [(inputs, inputs, torch.tensor([0, -100, 1]))], Config(prepare_batch=third)) == (0.5, 2)
    with pytest.raises(DataError, match=r"shape \(2,\) do not fit class scores of shape \(3, 3\)"):
        accuracy(model, [(inputs, inputs, torch.tensor([0, 1]))], Config(prepare_batch=third))


def third(raw: Any) -> Any:
    return raw[:1], {}, raw[2]


class Words(nn.Module):
    """A causal language model whose scores hang on the token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Embedding(10, 10)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.scores(input_ids)}


@torch.no_grad()
def test_padding_is_not_predicted() -> None:
    torch.manual_seed(0)
    model = Words()
    ids, mask = torch.randint(10, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    found, tokens = perplexity(model, [{"input_ids": ids, "attention_mask": mask}], Config())
    losses = [
        nn.functional.cross_entropy(model.scores(row[:-1]), row[1:], reduction="sum")
        for row in (ids[0, :4], ids[1])
    ]
    assert tokens == 3 + 5
    assert found == pytest.approx(float((sum(losses) / 8).exp()))
