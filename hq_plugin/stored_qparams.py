"""How steps and zero points are stored: rounded to a few bits, packed, and read again.

Training sees the rounding (`stored_step`, `stored_zero`), so that what is packed is what was trained. What a step
and a zero point mean is `quantization.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hq_plugin.quantization import weight_offset, weight_range

#: A step is stored in one byte: four bits of exponent, counted from that of the largest step of its weight, and
#: four of mantissa.
STEP_BYTES = 1
#: The exponent of the largest step, one byte a weight.
EXPONENT_BYTES = 1
#: The zero point of a group. With steps of one byte, less or more of either was no better (docs/experiments.md).
ZERO_BITS = 5
#: Bytes of an activation's float32 step and int32 zero point.
ACTIVATION_QPARAM_BYTES = 8

_MANTISSA, _EXPONENTS = 4, 16
#: Bits of float32 below a step's mantissa, and below its exponent.
_CUT, _FLOAT_MANTISSA = 23 - _MANTISSA, 23


def stored_step(step: Tensor) -> Tensor:
    """Rounds the steps of a weight to the precision in which they are stored; the gradient passes straight through.

    To four bits of mantissa, 3 % at most; what is more than 15 octaves below the largest is raised to that.

    Args:
        step: Positive float32, `[rows]`: all steps of one weight.
    """
    rounded = _rounded(step)
    lowest = ((_largest_exponent(rounded) - (_EXPONENTS - 1)) << _FLOAT_MANTISSA).view(torch.float32)
    return step + (torch.maximum(rounded, lowest) - step.detach())


def _rounded(step: Tensor) -> Tensor:
    bits = step.detach().float().contiguous().view(torch.int32)
    return (bits.add(1 << (_CUT - 1)) & -(1 << _CUT)).view(torch.float32)


def _largest_exponent(step: Tensor) -> Tensor:
    """Returns the biased exponent of the largest step, an int32 scalar, so that no octave below leaves float32."""
    exponents = step.view(torch.int32) >> _FLOAT_MANTISSA
    return exponents.amax().clamp(_EXPONENTS, 254)


def store_step(step: Tensor) -> Tensor:
    """Packs steps, rounded as by `stored_step`, into a byte each and one for the largest exponent.

    Args:
        step: Positive float32, `[rows]`.

    Returns:
        uint8, `[1 + rows]`: the largest exponent, biased as in float32, and the steps.
    """
    step = stored_step(step.detach().float())
    largest = _largest_exponent(step)
    bits = step.view(torch.int32)
    below = largest - (bits >> _FLOAT_MANTISSA)
    codes = ((_EXPONENTS - 1 - below) << _MANTISSA) | ((bits >> _CUT) & (2**_MANTISSA - 1))
    return torch.cat([largest.reshape(1), codes]).to(torch.uint8)


def load_step(stored: Tensor) -> Tensor:
    """Returns the float32 steps that `store_step` packed; whatever the bytes are, they are positive and finite."""
    codes = stored.to(torch.int32)
    exponents = codes[0] - (_EXPONENTS - 1) + (codes[1:] >> _MANTISSA)
    mantissas = (codes[1:] & (2**_MANTISSA - 1)) << _CUT
    return ((exponents.clamp(1, 254) << _FLOAT_MANTISSA) | mantissas).view(torch.float32)


def step_bytes(rows: int) -> int:
    """Returns the bytes that the steps of a weight take."""
    return STEP_BYTES * rows + EXPONENT_BYTES


def zero_unit(bits: int) -> float:
    """Returns the multiple in which the zero points of grouped weights are stored."""
    return 2.0 ** (bits - ZERO_BITS)


def store_zero(zero: Tensor, bits: int) -> Tensor:
    """Rounds zero points to integers of `ZERO_BITS` bits, int8, in units of `zero_unit(bits)`."""
    low, high = weight_range(ZERO_BITS)
    return (zero / zero_unit(bits)).round().clamp(low, high).to(torch.int8)


def load_zero(stored: Tensor, bits: int) -> Tensor:
    """Returns the float32 zero points that `store_zero` rounded."""
    return stored.float() * zero_unit(bits)


def stored_zero(zero: Tensor, bits: int, whole: bool = False) -> Tensor:
    """Rounds zero points to the precision in which they are stored; the gradient passes straight through.

    Args:
        zero: Float, `[rows]`.
        bits: 1 to 8.
        whole: Round so that the zero point, with the half step of 1 and 2 bits, is one of the integers of
            the weight (above 5 bits one of 32), as kernels with integer zero points want it.
    """
    rounded = zero.detach()
    if whole:
        unit, (low, high) = max(1.0, zero_unit(bits)), weight_range(bits)
        moved = ((rounded - weight_offset(bits)) / unit).round() * unit
        rounded = moved.clamp(low, high // unit * unit) + weight_offset(bits)
    return zero + (load_zero(store_zero(rounded, bits), bits) - zero.detach())
