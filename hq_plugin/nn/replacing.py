"""Puts modules in the place of others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """Puts modules in the place of others wherever a model refers to them.

    Args:
        model: A model, changed in place.
        new: What comes in, by the `id` of what goes.

    Returns:
        The model, or what came in its own place.
    """
    holder = nn.Module()
    holder.add_module("model", model)
    for parent in list(holder.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in new:
                parent._modules[name] = new[id(child)]
    return holder.get_submodule("model")


__all__ = ["replace_modules"]
