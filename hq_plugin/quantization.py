"""The quantization function: floats to integers of a given width and back, and its gradients.

Weights are quantized symmetrically with one step a channel (axis 0), or affinely with one step and one
zero point for each group of consecutive inputs of a channel; activations affinely with one step and one
integer zero point, a tensor or a row. Steps are learned (LSQ, Esser et al., arXiv:1902.08153;
zero points as in LSQ+, arXiv:2004.09576). Everything here is a pure function of tensors: no module,
no state, no policy.

Integer ranges, for b bits:

====================  ======================  =================================
what                  integers                value
====================  ======================  =================================
weights, b >= 3       -2^(b-1) .. 2^(b-1)-1   `integer * step`
weights, b <= 2       -2^(b-1) .. 2^(b-1)-1   `(integer + 1/2) * step`
grouped weights       as above                `(integer [+ 1/2] - zero) * step`
activations           0 .. 2^b-1              `(integer - zero_point) * step`
====================  ======================  =================================

The zero point of a group need not be whole: it is stored in five bits, as a multiple of 2^b/32, so that a
group may lie on one side of 0.

The half step at 1 and 2 bits makes the few levels symmetric: binary weights are ±step/2, and at 2
bits the four levels ±step/2, ±3step/2 fit a bell-shaped channel better than LSQ's -2, -1, 0, 1
(a uniform quantizer without a zero level is the optimal one for a Gaussian at 2 bits).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hq_plugin.errors import PolicyError

#: A step is stored in one byte: four bits of exponent, counted from that of the largest step of its weight, and
#: four of mantissa. Training sees the rounding.
STEP_BYTES = 1
#: The exponent of the largest step, one byte a weight.
EXPONENT_BYTES = 1
#: The zero point of a group. With steps of one byte, less or more of either was no better (docs/experiments.md).
ZERO_BITS = 5
#: Bytes of an activation's float32 step and int32 zero point.
ACTIVATION_QPARAM_BYTES = 8

_SMALLEST_STEP = 1e-12
#: The widest range that is tried for a group, as a share of that of its values.
_BEYOND = 1.06
_MANTISSA, _EXPONENTS = 4, 16
#: Bits of float32 below a step's mantissa, and below its exponent.
_CUT, _FLOAT_MANTISSA = 23 - _MANTISSA, 23


def weight_range(bits: int) -> tuple[int, int]:
    """Returns the smallest and largest integer of a `bits`-wide weight, both included."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def weight_offset(bits: int) -> float:
    """Returns what is added to a weight's integer before it is scaled: 1/2 for 1 and 2 bits, else 0."""
    return 0.5 if bits <= 2 else 0.0


def activation_range(bits: int) -> tuple[int, int]:
    """Returns the smallest and largest integer of a `bits`-wide activation, both included."""
    return 0, 2**bits - 1


def per_channel(step: Tensor, weight: Tensor) -> Tensor:
    """Views a step of shape `[channels]` so that it broadcasts over `weight` of shape `[channels, ...]`."""
    return step.reshape(-1, *(1,) * (weight.dim() - 1))


def round_ste(x: Tensor) -> Tensor:
    """Rounds half to even; the gradient passes straight through (Bengio et al., arXiv:1308.3432)."""
    return x + (x.round() - x).detach()


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
    step = stored_step(step.detach())
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


def weight_rows(weight: Tensor, group_size: int) -> Tensor:
    """Views a weight as `[rows, inputs]`, with one row for each step.

    Args:
        weight: `[channels, ...]`.
        group_size: Inputs of a row; 0 takes whole channels.

    Raises:
        PolicyError: The weight has no groups of that size.
    """
    if group_size and (weight.dim() != 2 or weight.shape[1] % group_size):
        raise PolicyError(
            f"A weight of shape {tuple(weight.shape)} has no groups of {group_size} inputs: the group size must "
            "divide the inputs of a linear layer or the width of an embedding."
        )
    return weight.reshape(-1, group_size) if group_size else weight.reshape(weight.shape[0], -1)


def _shift(zero: Tensor | None, weight: Tensor, bits: int) -> Tensor | float:
    """Returns what is added to an integer before it is scaled."""
    return weight_offset(bits) if zero is None else weight_offset(bits) - per_channel(zero, weight)


def quantize_weight(weight: Tensor, step: Tensor, bits: int, zero: Tensor | None = None) -> Tensor:
    """Quantizes a weight to integers.

    Args:
        weight: Float, `[rows, ...]`; a row is a channel, or a group (see `weight_rows`).
        step: Positive float, `[rows]`.
        bits: 1 to 8.
        zero: Float, `[rows]`; None is a symmetric weight.

    Returns:
        int8, the shape of `weight`, inside `weight_range(bits)`.
    """
    low, high = weight_range(bits)
    scaled = weight / per_channel(step, weight) - _shift(zero, weight, bits)
    return scaled.round_().clamp_(low, high).to(torch.int8)


def dequantize_weight(integers: Tensor, step: Tensor, bits: int, zero: Tensor | None = None) -> Tensor:
    """Returns the float values of `integers`, in the dtype of `step`; inverse of `quantize_weight`."""
    return (integers.to(step.dtype) + _shift(zero, integers, bits)).mul_(per_channel(step, integers))


class _FakeQuantizeWeight(torch.autograd.Function):
    """Fake quantization of a weight in few passes; two tensors of the weight's size are saved."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, zero: Tensor | None, bits: int) -> Tensor:
        low, high = weight_range(bits)
        shift = _shift(zero, weight, bits)
        scale = per_channel(step, weight)
        out = (weight / scale).sub_(shift).round_().clamp_(low, high).add_(shift).mul_(scale)
        ctx.save_for_backward(weight, out, step, *(() if zero is None else (zero,)))
        ctx.bits = bits
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, out, step, *rest = ctx.saved_tensors
        zero: Tensor | None = rest[0] if rest else None
        grad, scale = grads[0], per_channel(step, weight)
        low, high = weight_range(ctx.bits)
        shift = _shift(zero, weight, ctx.bits)
        # What rounds to an integer inside the range.
        inside = ((low - 0.5 + shift) * scale <= weight) & (weight <= (high + 0.5 + shift) * scale)
        grad_weight = grad * inside
        # d out/d step = (out - weight)/step inside the range, out/step outside (arXiv:1902.08153, eq. 3).
        grad_step = ((grad * out).flatten(1).sum(1) - (grad_weight * weight).flatten(1).sum(1)) / step
        grad_zero = None
        if zero is not None:
            # d out/d zero = -step outside the range, 0 inside (arXiv:2004.09576, eq. 6).
            grad_zero = (grad_weight.flatten(1).sum(1) - grad.flatten(1).sum(1)) * step
        return grad_weight, grad_step, grad_zero, None


def fake_quantize_weight(weight: Tensor, step: Tensor, bits: int, zero: Tensor | None = None) -> Tensor:
    """Quantizes and dequantizes a weight, differentiably in the weight, the step and the zero point.

    The forward value equals `dequantize_weight(quantize_weight(...))` bit for bit; the gradients are LSQ's
    (arXiv:1902.08153) and LSQ+'s (arXiv:2004.09576).

    Args:
        weight: Float, `[rows, ...]`.
        step: Positive float, `[rows]`.
        bits: 1 to 8.
        zero: Float, `[rows]`; None is a symmetric weight.
    """
    return _FakeQuantizeWeight.apply(weight, step, zero, bits)  # type: ignore[no-any-return]


class _FakeQuantizeActivation(torch.autograd.Function):
    """Affine fake quantization with one step: few, vectorized passes, and only two saved tensors.

    `torch.fake_quantize_per_tensor_affine` took 3 to 15 times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        scale, zero = float(step), round(float(zero_point))
        low, high = (limit - zero for limit in activation_range(bits))
        out = (x * (1 / scale)).round_().clamp_(low, high).mul_(scale)
        ctx.save_for_backward(x, out)
        ctx.scale, ctx.low, ctx.high = scale, low * scale, high * scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, out = ctx.saved_tensors
        grad = grads[0].to(x.dtype)
        grad_x = torch.ops.aten.hardtanh_backward(grad, x, ctx.low, ctx.high)
        # d out/d step = (out - x)/step inside the range, out/step outside (arXiv:1902.08153, eq. 3);
        # d out/d zero_point = -step outside (arXiv:2004.09576, eq. 6).
        grad_step = (_dot(grad, out) - _dot(grad_x, x)) / ctx.scale
        grad_zero = (grad_x.sum() - grad.sum()) * ctx.scale
        return grad_x, grad_step.reshape(()), grad_zero.reshape(()), None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def fake_quantize_activation(x: Tensor, step: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Quantizes and dequantizes an activation, differentiably in `x`, `step` and `zero_point`.

    Args:
        x: Float, any shape.
        step: Positive float scalar tensor.
        zero_point: Float scalar tensor; it is rounded to an integer.
        bits: 2 to 8.
    """
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        # Reading the step as a number, as below, would cut a compiled graph in two.
        zero = zero_point.round()
        low, high = (limit - zero for limit in activation_range(bits))
        return ((x * (1 / step)).round().clamp(low, high) * step).to(x.dtype)
    return _FakeQuantizeActivation.apply(x, step, zero_point, bits)  # type: ignore[no-any-return]


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes an activation with a step and a zero point for each row of its last dimension.

    Those of ONNX's DynamicQuantizeLinear, which takes them a tensor: the range is that of the row and 0.

    Args:
        x: Float, `[..., inputs]`.
        bits: 2 to 8.

    Returns:
        Integers inside `activation_range(bits)` as floats, in the shape of `x`; steps and zero points,
        `[..., 1]`. All are float32.
    """
    x, top = x.float(), activation_range(bits)[1]
    low, high = x.amin(-1, keepdim=True).clamp(max=0.0), x.amax(-1, keepdim=True).clamp(min=0.0)
    step = ((high - low) / top).clamp(min=_SMALLEST_STEP)
    zero = (-low / step).round()
    return ((x / step).round() + zero).clamp(0, top), step, zero


class _FakeQuantizeRows(torch.autograd.Function):
    """`quantize_rows` and back. Nothing lies outside a row's range, so the gradient passes everywhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        integers, step, zero = quantize_rows(x, bits)
        return integers.sub_(zero).mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def fake_quantize_rows(x: Tensor, bits: int) -> Tensor:
    """Quantizes and dequantizes an activation row by row, differentiably in `x`.

    Args:
        x: Float, `[..., inputs]`; a row is a token, say.
        bits: 2 to 8.
    """
    return _FakeQuantizeRows.apply(x, bits)  # type: ignore[no-any-return]


def optimal_weight_step(weight: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Searches, row by row, the step with the smallest squared error.

    Args:
        weight: Float, `[rows, ...]`.
        bits: 1 to 8.
        importance: Non-negative, broadcastable to `[rows, inputs]`: the weight of each squared error.

    Returns:
        Positive float32, `[rows]`, already rounded to the stored precision.
    """
    return stored_step(
        torch.cat([_row_step(rows, bits, weights) for rows, weights in _row_chunks(weight, importance)])
    )


def _row_step(flat: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    largest = flat.abs().amax(1).clamp_min(_SMALLEST_STEP)
    top = weight_range(bits)[1] + weight_offset(bits)
    if bits == 1:
        # ±step/2 with the least squared error is ± the mean magnitude (XNOR-Net, arXiv:1603.05279).
        mean = flat.abs().mean(1) if importance is None else _weighted(flat.abs(), importance)
        return stored_step((2 * mean).clamp_min(_SMALLEST_STEP))
    best = largest / top
    best_error = torch.full_like(best, float("inf"))
    for fraction in torch.linspace(0.15, 1.2, 48).tolist():
        step = stored_step((largest * fraction / top).clamp_min(_SMALLEST_STEP))
        error = _weight_error(flat, step, bits, None, importance)
        better = error < best_error
        best, best_error = torch.where(better, step, best), torch.where(better, error, best_error)
    return best


def optimal_weight_qparams(
    weight: Tensor, bits: int, importance: Tensor | None = None, whole: bool = False
) -> tuple[Tensor, Tensor]:
    """Searches, row by row, the step and zero point with the smallest squared error.

    The ends of a row's range are pulled in together, and then each by itself.

    Args:
        weight: Float, `[rows, ...]`.
        bits: 1 to 8.
        importance: Non-negative, broadcastable to `[rows, inputs]`: the weight of each squared error.
        whole: As for `stored_zero`.

    Returns:
        Step (positive) and zero point, float32 `[rows]` each, already rounded to the stored precision.
    """
    found = [_row_qparams(rows, bits, weights, whole) for rows, weights in _row_chunks(weight, importance)]
    return stored_step(torch.cat([step for step, _ in found])), torch.cat([zero for _, zero in found])


def _row_qparams(flat: Tensor, bits: int, importance: Tensor | None, whole: bool) -> tuple[Tensor, Tensor]:
    low, high = flat.amin(1), flat.amax(1)
    levels, lowest = 2**bits - 1, weight_range(bits)[0] + weight_offset(bits)

    def qparams(bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        step = stored_step(((top - bottom) / levels).clamp_min(_SMALLEST_STEP))
        return step, stored_zero(lowest - bottom / step, bits, whole)

    best_low, best_high = low, high
    best_step, best_zero = qparams(low, high)
    best_error = _weight_error(flat, best_step, bits, best_zero, importance)
    # The wider the weight, the less clipping gains: many ranges are tried at 2 bits, few at 8. Some reach beyond
    # the values, for a step and a zero point that are rounded may cover less than what they stand for.
    least, count = max(0.35, 1 - 1.2 / bits), max(4, 13 - 2 * bits)
    for side in ("both", "low", "high"):
        start_low, start_high = best_low, best_high
        for fraction in torch.linspace(least, _BEYOND, count).tolist():
            bottom = start_low if side == "high" else low * fraction
            top = start_high if side == "low" else high * fraction
            step, zero = qparams(bottom, top)
            error = _weight_error(flat, step, bits, zero, importance)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_step, best_zero = torch.where(better, step, best_step), torch.where(better, zero, best_zero)
            best_low, best_high = torch.where(better, bottom, best_low), torch.where(better, top, best_high)
    return best_step, best_zero


def optimal_group_qparams(
    weight: Tensor, bits: int, group_size: int, importance: Tensor | None = None, whole: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Searches the steps of a weight, and where it has groups their zero points, with the smallest squared error.

    Args:
        weight: Float, `[channels, ...]`.
        bits: 1 to 8.
        group_size: Inputs that share a step and a zero point; 0 for one step a channel and no zero point.
        importance: Non-negative, broadcastable to `[channels, inputs]`: the weight of each squared error.
        whole: As for `stored_zero`.

    Returns:
        Step and zero point of each row of `weight_rows(weight, group_size)`; None for whole channels.
    """
    rows = weight_rows(weight, group_size)
    if importance is not None:
        importance = weight_rows(importance.expand(weight.shape[0], -1), group_size)
    if group_size:
        return optimal_weight_qparams(rows, bits, importance, whole)
    return optimal_weight_step(rows, bits, importance), None


#: Weights worked on at once in the searches above: their few temporaries fit a processor's cache.
_CHUNK = 1 << 16


def _row_chunks(weight: Tensor, importance: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    flat = weight.detach().float().flatten(1)
    rows = max(1, _CHUNK // max(1, flat.shape[1]))
    spread = None if importance is None else importance.expand(flat.shape[0], -1)
    for start in range(0, max(1, flat.shape[0]), rows):
        stop = start + rows
        yield flat[start:stop], None if spread is None else spread[start:stop]


def _weight_error(flat: Tensor, step: Tensor, bits: int, zero: Tensor | None, importance: Tensor | None) -> Tensor:
    low, high = weight_range(bits)
    shift, scale = _shift(zero, flat, bits), per_channel(step, flat)
    error = (flat / scale).sub_(shift).round_().clamp_(low, high).add_(shift).mul_(scale).sub_(flat).square_()
    return error.sum(1) if importance is None else error.mul_(importance).sum(1)


def _weighted(values: Tensor, importance: Tensor) -> Tensor:
    weights = importance.expand_as(values)
    return (values * weights).sum(1) / weights.sum(1).clamp_min(_SMALLEST_STEP)


def optimal_activation_qparams(
    samples: Tensor, low: float, high: float, bits: int, candidates: int = 40
) -> tuple[float, float]:
    """Searches the step and zero point with the smallest squared error over observed values.

    Args:
        samples: Observed values, one dimension.
        low: The smallest value observed.
        high: The largest value observed.
        bits: 2 to 8.
        candidates: How many clipping points are tried.

    Returns:
        The step, positive, and the zero point, a whole number in `activation_range(bits)`.
    """
    levels = activation_range(bits)[1]
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low < _SMALLEST_STEP:
        return 1.0 / levels, 0.0
    samples = samples.detach().float()
    best, best_error = ((high - low) / levels, 0.0), float("inf")
    for fraction in torch.linspace(0.05, 1.0, candidates).tolist():
        # Sides shrink together; one that is short already (a SiLU's negative side) is kept.
        for below in {low * fraction, max(low, -high * fraction)}:
            step = max((high * fraction - below) / levels, _SMALLEST_STEP)
            zero = min(max(round(-below / step), 0), levels)
            rounded = (samples / step).round().clamp(-zero, levels - zero) * step
            error = float((rounded - samples).square().sum())
            if error < best_error:
                best, best_error = (step, float(zero)), error
    return best
