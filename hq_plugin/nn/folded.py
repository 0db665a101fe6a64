"""Convolutions that take over the BatchNorm after them.

In eval mode BatchNorm is one affine map a channel. The steps of a weight and a bias can hold it, which saves a pass
over the result. Which pairs there are is `hq_plugin.folding`'s to find.

A convolution that has taken over its BatchNorm marks what it returns, and the BatchNorm lets pass what bears the
mark. Where either was copied, moved, trained or compiled, or runs on other numbers than those that were taken over,
there is no mark, and the BatchNorm does what it always did.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_plugin.batchnorm import affine_of
from hq_plugin.nn.kernels import REFERENCE, Affine, Bound, FoldingKernel, Run
from hq_plugin.nn.packed import PackedModule, adopt, versions, wants_gradient

#: Attribute of a tensor: the token of the pair that made it.
_MARK = "_hq_normalised"


class DequantizedFolding(FoldingKernel):
    """The layer's own forward, on a float weight that holds the BatchNorm's scale."""

    name, tolerance, holds_weight = REFERENCE, 1e-5, True

    def refuses(self, layer: PackedModule) -> str | None:
        """Returns why the kernel cannot compute a layer: it keeps a float weight."""
        return None if layer._cache_enabled else "its dequantized weight is not to be kept"

    def bind(self, layer: PackedModule, norm: Affine | None = None) -> Run:
        """Returns the float layer's forward on a quantized input."""
        made = adopt(layer, layer._float_type)
        made.__dict__.update(_cached=None, _lent=None, _kernel=None)
        weight: Tensor = layer.weight.detach()
        bias: Tensor | None = layer._parameters["bias"]
        if norm is not None:
            scale, shift = (part.to(weight) for part in norm)
            bias = shift if bias is None else bias.detach() * scale + shift
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        step, low, high = layer.input_levels() if layer.bits.static_input else (1.0, 0, 0)
        made._buffers.clear()
        # Inputs stay whole numbers, and the weight holds their step: one pass less.
        made._parameters = {
            name: None if value is None else nn.Parameter(value, requires_grad=False)
            for name, value in (("weight", weight * step), ("bias", bias))
        }
        forward: Run = made.forward
        if not layer.bits.static_input:
            return lambda x: forward(layer.quantize_input(x))
        return lambda x: forward((x * (1 / step)).round_().clamp_(low, high))


class Folded(Bound):
    """A kernel bound to a convolution and to the BatchNorm after it."""

    def __init__(self, kernel: FoldingKernel, layer: PackedModule, norm: Any) -> None:
        scale, shift = affine_of(norm)
        normalised, token = kernel.bind(layer, (scale.float(), shift.float())), object()

        def run(x: Tensor) -> Tensor:
            y = normalised(x)
            setattr(y, _MARK, token)
            return y

        self.kernel, self.run = kernel, run
        self._norm, self._known = norm, _now(norm)
        norm.__class__ = _passing_type(float_type(norm))
        norm._hq_token = token

    def select(self, x: Tensor) -> Run | None:
        """Returns what computes both; None, so that neither is skipped, for gradients and where that changed."""
        if not isinstance(x, Tensor) or self._norm.training or wants_gradient(x):
            return None
        return self.run if _now(self._norm) == self._known else None

    def again(self, layer: PackedModule) -> Bound | None:
        """Returns the kernel alone, bound to the layer as it is now: its BatchNorm may not have been moved yet."""
        return None if self.kernel.name == REFERENCE else super().again(layer)

    def unfold(self) -> None:
        """Gives the BatchNorm its class back."""
        self._norm.__class__ = float_type(self._norm)
        self._norm.__dict__.pop("_hq_token", None)


class _PassingNorm(nn.Module):
    """Mixin of a BatchNorm that lets pass what the convolution before it has normalised."""

    _hq_token: object

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and getattr(x, _MARK, None) is self._hq_token:
            setattr(x, _MARK, None)  # so that it passes once
            return after_norm(self, x)
        output: Tensor = super().forward(x)
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy is a BatchNorm like any other.
        state = {name: value for name, value in self.__dict__.items() if name != "_hq_token"}
        return _empty, (float_type(self),), state


def _empty(norm_type: type[nn.Module]) -> nn.Module:
    return norm_type.__new__(norm_type)


@cache
def _passing_type(norm_type: Any) -> type[Any]:
    # torch.fx takes layers apart by the module that their class is from.
    own = {"_float_type": norm_type, "__module__": norm_type.__module__}
    return type(norm_type.__name__, (_PassingNorm, norm_type), own)


def float_type(module: nn.Module) -> Any:
    """Returns the class of the float layer that a packed layer, or a BatchNorm that was taken over, stands for."""
    return getattr(type(module), "_float_type", type(module))


def after_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Does what a BatchNorm that holds other modules (timm's an activation) does once it has normalised."""
    for child in norm.children():
        x = child(x)
    return x


def normalise(norm: Any, y: Tensor) -> Tensor:
    """Does what a BatchNorm in eval mode does, other modules in it left out."""
    return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def _now(norm: Any) -> list[tuple[int, int]]:
    # Training changes the statistics without a trace in their versions; it counts batches.
    counted = [] if norm.num_batches_tracked is None else [norm.num_batches_tracked]
    return versions(norm.running_mean, norm.running_var, norm.weight, norm.bias, *counted)
