"""Puts modules in the place of others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

#: Where a module keeps the hooks of its forward.
HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """Puts modules in the place of others wherever a model refers to them, with their hooks.

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
                take_over_hooks(new[id(child)], child)
                parent._modules[name] = new[id(child)]
    return holder.get_submodule("model")


def take_over_hooks(new: nn.Module, old: nn.Module) -> None:
    """Gives a module the hooks of the one whose place it takes.

    It has the same dictionaries, and no copies: a handle that the model keeps (as transformers does for gradient
    checkpointing) refers to them, and could not be copied once they are gone.

    Args:
        new: What comes in.
        old: What goes.
    """
    new.__dict__.update({name: vars(old)[name] for name in HOOKS})


__all__ = ["HOOKS", "replace_modules", "take_over_hooks"]
