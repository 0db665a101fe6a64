"""Whether this machine's sums of 8-bit products are clipped, and for which widths that cannot be.

Processors of x86 without VNNI (AVX2, and AVX-512 before Cascade Lake) multiply unsigned inputs by signed weights
and add pairs of products in 16 bits, which clips what does not fit: oneDNN's "Nuances of int8 computations"; ONNX
Runtime's `session.x64quantprecision`. Of the widths that hq_plugin has only 8 and 8 bits together reach that.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

#: Last arguments of oneDNN's operators: the result in float32, and nothing computed after it.
PLAIN_OUTPUT: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")


def may_clip(weight_bits: int, activation_bits: int) -> bool:
    """Returns whether two products of integers from 0 to 2^a - 1 and from -2^(w - 1) may exceed 16 bits.

    2 · 2^(w - 1) · (2^a - 1) is below 2^15 where w + a is at most 15.
    """
    return weight_bits + activation_bits > 15


@cache
def saturates() -> bool:
    """Returns whether oneDNN clips sums of large 8-bit products here: it is asked for one, where torch has it."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    size = 8
    with torch.device("cpu"):  # whatever the default is
        weight = torch.ops.onednn.qlinear_prepack(torch.full((size, size), 127, dtype=torch.int8), None)
        ones, zeros = torch.ones(size, dtype=torch.float32), torch.zeros(size, dtype=torch.int32)
        x = torch.full((size, size), 255, dtype=torch.uint8)
    y = torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, weight, ones, zeros, None, *PLAIN_OUTPUT)
    return bool((y != 255 * 127 * size).any())
