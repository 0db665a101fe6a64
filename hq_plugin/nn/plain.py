"""Layers whose weight is computed from other parameters (weight norm, an adapter), as plain layers.

Once trained, the weight is a constant: what is quantized and stored is its value, and the parameters that it came
from are gone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize

_CHILD = "parametrizations"


def parametrized_weight(module: nn.Module) -> bool:
    """Whether a module has a weight that is computed by `torch.nn.utils.parametrize`, and nothing else is."""
    return parametrize.is_parametrized(module, "weight") and len(module.parametrizations) == 1  # type: ignore[arg-type]


def with_plain_weights(model: nn.Module, layers: Iterable[str], *, inplace: bool = False) -> nn.Module:
    """Returns a copy of a model in which computed weights are parameters.

    Args:
        model: A model in eval mode; without anything to change it is returned itself.
        layers: Names of layers. Those whose weight is a parameter already, and those of no layer, are passed over,
            so that a whole policy may be given.
        inplace: Whether to change `model` itself.
    """
    modules = dict(model.named_modules())
    wanted = [name for name in layers if name in modules and parametrized_weight(modules[name])]
    if not wanted:
        return model
    model = model if inplace else copy.deepcopy(model)
    for name in wanted:
        module = model.get_submodule(name)
        if parametrized_weight(module):  # not one that has another name, too
            _make_plain(module)
    return model


def _make_plain(module: nn.Module) -> None:
    trained = any(parameter.requires_grad for parameter in module.parameters())
    with torch.no_grad():
        # A skeleton has parameters without values, and only the shape matters.
        source = copy.deepcopy(module).to("meta") if any(p.is_meta for p in module.parameters()) else module
        weight = source.weight.detach().clone()  # type: ignore[operator, union-attr]
    # Not `remove_parametrizations`: it takes the property off the class, which copies of the module share.
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules[_CHILD]
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=trained))


__all__ = ["parametrized_weight", "with_plain_weights"]
