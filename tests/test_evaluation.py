import pytest
import torch
from torch import nn

from hq_plugin.config import Config
from hq_plugin.errors import DataError
from hq_plugin.evaluation import accuracy


def test_accuracy_without_labels_says_how_a_folder_gives_them() -> None:
    with pytest.raises(DataError, match="a folder for each class"):
        accuracy(nn.Linear(4, 3), [torch.zeros(2, 4)], Config())


def test_accuracy_counts_what_is_right() -> None:
    inputs = torch.eye(3)
    assert accuracy(nn.Identity(), [(inputs, torch.tensor([0, 1, 1]))], Config()) == (2 / 3, 3)
