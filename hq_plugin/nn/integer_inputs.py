"""Inputs of packed layers as the 8-bit integers that integer kernels take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hq_plugin.nn.packed import PackedModule
from hq_plugin.quantization import activation_range

#: Elements of an input that are quantized at once.
CHUNK = 1 << 17
#: A float32 of this size has no bits for a fraction: what is added to it is rounded, half to even, and stands as an
#: integer in the last bits of the sum.
_WHOLE = 1.5 * 2**23


def input_quantizer(layer: PackedModule) -> tuple[Callable[[Tensor], Tensor], float, int]:
    """Returns what turns a layer's input into uint8, to the integers of its own forward; its step and zero point.

    Args:
        layer: A packed layer whose input has one step.
    """
    step, zero_point = float(layer.activation_step), int(layer.activation_zero_point)
    low, high = (_WHOLE + limit - zero_point for limit in activation_range(layer.bits.activation))

    def round_to(x: Tensor) -> Tensor:
        # The cast of integers is vectorized, which that of floats to uint8 is not; it keeps the last 8 bits.
        whole = (x * (1 / step)).float().add_(_WHOLE).clamp_(low, high).view(torch.int32).to(torch.uint8)
        return whole.add_(zero_point) if zero_point else whole

    def quantized(x: Tensor) -> Tensor:
        dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        if x.numel() <= CHUNK or not dense:
            return round_to(x)
        # Piece by piece, so that the floats between stay in the processor's cache.
        result = torch.empty_like(x, dtype=torch.uint8)
        for source, target in zip(_in_memory(x), _in_memory(result), strict=True):
            target.copy_(round_to(source))
        return result

    return quantized, step, zero_point


def _in_memory(x: Tensor) -> tuple[Tensor, ...]:
    """Returns a dense tensor's elements in the order in which they lie in memory, in pieces."""
    return x.as_strided((x.numel(),), (1,)).split(CHUNK)
