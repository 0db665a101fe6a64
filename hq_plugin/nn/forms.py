"""Makes of a float model the layers that a policy names, where they are not layers of its own."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from hq_plugin.nn.held import with_held_weights
from hq_plugin.nn.plain import with_plain_weights
from hq_plugin.nn.split import with_split_tables


def with_layers_of(model: nn.Module, layers: Iterable[str], *, inplace: bool = False) -> nn.Module:
    """Returns a copy of a model whose parameters, tables and computed weights are the layers of these names.

    Args:
        model: A model; without anything to change it is returned itself.
        layers: Names, as a policy has them; those of other layers, and of none, are passed over.
        inplace: Whether to change `model` itself.
    """
    layers = list(layers)
    made = model
    for form in (with_plain_weights, with_held_weights, with_split_tables):
        made = form(made, layers, inplace=inplace or made is not model)
    return made


__all__ = ["with_layers_of"]
