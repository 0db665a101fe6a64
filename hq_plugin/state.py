"""The tensors of a model's state, where modules may keep other things there as well (`get_extra_state`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of a model's state by name. The rest is Python's, which no file of ours holds."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """Returns what tensors have in common that are the same values in one memory: tied, and no other view of it."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def load_state(model: nn.Module, tensors: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Loads all tensors of a model's state; what else is in it stays as it is.

    Args:
        model: Changed in place.
        tensors: As `state_tensors` has them.
        assign: Whether parameters become these tensors, in place of copies.

    Raises:
        RuntimeError: A tensor is missing, is too much, or does not fit.
    """
    rest = {name: value for name, value in model.state_dict().items() if not isinstance(value, Tensor)}
    model.load_state_dict({**rest, **tensors}, assign=assign)
