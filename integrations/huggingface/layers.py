"""Layers of transformers that are a Linear under another name."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

M = TypeVar("M", bound=PreTrainedModel)


def with_linear_layers(model: M, *, inplace: bool = False) -> M:
    """Returns the model with each `Conv1D` (GPT-2's transposed Linear) as the Linear that it is.

    Args:
        model: A model; it is copied if it holds such layers, unless `inplace`.
        inplace: Change `model` itself.
    """
    if not any(isinstance(module, Conv1D) for module in model.modules()):
        return model
    model = model if inplace else copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv1D):
                inputs, outputs = child.weight.shape
                linear = nn.Linear(inputs, outputs, device="meta")
                linear.weight = nn.Parameter(child.weight.detach().T.contiguous())
                linear.bias = child.bias
                setattr(parent, name, linear.train(child.training))
    return model
