"""Which convolutions are followed by a BatchNorm and by nothing else, and letting them take it over."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hq_plugin.batchnorm import foldable
from hq_plugin.nn import PackedModule
from hq_plugin.nn.folded import DequantizedFolding, Folded, after_norm, normalise
from hq_plugin.nn.kernels import KERNELS, REFERENCE, FoldingKernel, norm_of

_OWN_FORWARD = DequantizedFolding()


class _Uses(TorchFunctionMode):
    """Notes which of some tensors torch is called with, outside the layers that are watched."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[str, Any]] = {}
        self.used: set[str] = set()
        self.inside = 0

    def maker(self, value: Any) -> str | None:
        """Returns the layer that made a tensor."""
        name, reference = self.made.get(id(value), ("", lambda: None))
        return name if reference() is value else None

    def note(self, values: Any) -> None:
        """Counts some values as used."""
        self.used |= {name for value in values if (name := self.maker(value)) is not None}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.inside:
            self.note(tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def batchnorm_after(
    model: nn.Module, layers: Mapping[str, PackedModule], run: Callable[[], Any]
) -> dict[str, nn.Module]:
    """Returns the BatchNorm after each convolution whose result goes there and nowhere else.

    Args:
        model: The model, in eval mode.
        layers: Packed layers by name.
        run: Runs the model once.
    """
    names = {
        layer: name for name, layer in layers.items() if isinstance(layer, _ConvNd) and not layer._forward_hooks
    }
    norms = [module for module in model.modules() if foldable(module) and not module.training]
    if not names or not norms:
        return {}
    uses, calls, taken = _Uses(), Counter[str](), list[tuple[str | None, nn.Module]]()

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        if module not in names and len(args) == 1:
            taken.append((uses.maker(args[0]), module))
        else:
            uses.note(tree_leaves((args, kwargs)))
        uses.inside += 1

    def leave(module: Any, args: Any, output: Any) -> None:
        uses.inside -= 1
        if module in names:
            calls[names[module]] += 1
            if isinstance(output, Tensor):
                uses.made[id(output)] = names[module], weakref.ref(output)

    handles = []
    try:
        for module in (*names, *norms):
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        with uses:
            output = run()
        uses.note(tree_leaves(output))
    finally:
        for handle in handles:
            handle.remove()
    takers, givers = Counter(maker for maker, _ in taken), Counter(norm for _, norm in taken)
    return {
        maker: norm
        for maker, norm in taken
        if maker is not None and maker not in uses.used and calls[maker] == takers[maker] == givers[norm] == 1
    }


@torch.no_grad()
def fold(layer: PackedModule, norm: nn.Module, kernel: str, x: Tensor) -> bool:
    """Lets a convolution take over the BatchNorm after it, unless that changes what both compute.

    Args:
        layer: The convolution; it is given a kernel.
        norm: The BatchNorm, which lets pass what the convolution has normalised.
        kernel: Name of the kernel that it is to run on.
        x: Its input.

    Returns:
        Whether it did. It is left as it was if the kernel takes over none, and if the results differ.
    """
    made = _OWN_FORWARD if kernel == REFERENCE else KERNELS[kernel]
    if not isinstance(made, FoldingKernel) or made.refuses(layer) is not None:
        return False
    y = layer.forward(x)
    expected = normalise(norm, y)
    # A subclass may do more than to run what it holds after it has normalised; and that may work in place.
    if not torch.equal(norm.forward(y.clone()), after_norm(norm, expected.clone())):
        return False
    folded = Folded(made, layer, norm)
    found = folded.run(x)
    size = max(norm_of(expected), norm_of(normalise(norm, torch.zeros_like(y))), 1e-12)
    if found.shape != expected.shape or not norm_of(found.float() - expected.float()) <= made.tolerance * size:
        folded.unfold()
        return False
    layer.set_kernel(folded)
    return True


def unfold(model: nn.Module) -> None:
    """Undoes what `fold` did to every layer of a model; their kernels are gone as well."""
    for layer in model.modules():
        if isinstance(layer, PackedModule) and isinstance(layer._kernel, Folded):
            layer._kernel.unfold()
            layer.set_kernel(None)
