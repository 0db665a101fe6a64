"""The quantization function: floats to integers of a given width and back, and its gradients.

Weights are quantized symmetrically with one step a channel (axis 0), or affinely with one step and one
zero point for each group of consecutive inputs of a channel; activations affinely with one step and one
integer zero point, a tensor or a row. Steps are learned (LSQ, Esser et al., arXiv:1902.08153;
zero points as in LSQ+, arXiv:2004.09576). Everything here is a pure function of tensors: no module,
no state, no policy. How steps and zero points are stored is `stored_qparams.py`, which are best is found by
`optimal_qparams.py`.

Integer ranges, for b bits:

====================  ======================  =================================
what                  integers                value
====================  ======================  =================================
weights, b >= 3       -2^(b-1) .. 2^(b-1)-1   `integer * step`
weights, b = 1, 2     -2^(b-1) .. 2^(b-1)-1   `(integer + 1/2) * step`
weights, b = 0        0                       0
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

from typing import Any

import torch
from torch import Tensor

from hq_plugin.errors import PolicyError

#: No step is smaller: what is always 0 has one, too.
SMALLEST_STEP = 1e-12


def weight_range(bits: int) -> tuple[int, int]:
    """Returns the smallest and largest integer of a `bits`-wide weight, both included."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if bits else (0, 0)


def weight_offset(bits: int) -> float:
    """Returns what is added to a weight's integer before it is scaled: 1/2 for 1 and 2 bits, else 0."""
    return 0.5 if bits in (1, 2) else 0.0


def activation_range(bits: int) -> tuple[int, int]:
    """Returns the smallest and largest integer of a `bits`-wide activation, both included."""
    return 0, 2**bits - 1


def per_channel(step: Tensor, weight: Tensor) -> Tensor:
    """Views a step of shape `[channels]` so that it broadcasts over `weight` of shape `[channels, ...]`."""
    return step.reshape(-1, *(1,) * (weight.dim() - 1))


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


def shift_of(zero: Tensor | None, weight: Tensor, bits: int) -> Tensor | float:
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
    scaled = weight / per_channel(step, weight) - shift_of(zero, weight, bits)
    return scaled.round_().clamp_(low, high).to(torch.int8)


def dequantize_weight(integers: Tensor, step: Tensor, bits: int, zero: Tensor | None = None) -> Tensor:
    """Returns the float values of `integers`, in the dtype of `step`; inverse of `quantize_weight`."""
    return (integers.to(step.dtype) + shift_of(zero, integers, bits)).mul_(per_channel(step, integers))


class _FakeQuantizeWeight(torch.autograd.Function):
    """Fake quantization of a weight in few passes; two tensors of the weight's size are saved."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, zero: Tensor | None, bits: int) -> Tensor:
        low, high = weight_range(bits)
        shift = shift_of(zero, weight, bits)
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
        shift = shift_of(zero, weight, ctx.bits)
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
        bits: 0 to 8; what is left out has no gradient.
        zero: Float, `[rows]`; None is a symmetric weight.
    """
    if bits == 0:
        return torch.zeros_like(weight)
    return _FakeQuantizeWeight.apply(weight, step, zero, bits)  # type: ignore[no-any-return]


class _FakeQuantizeActivation(torch.autograd.Function):
    """Affine fake quantization with one step: few, vectorized passes, and only two saved tensors.

    `torch.fake_quantize_per_tensor_affine` took 3 to 15 times as long on a CPU. Elsewhere steps stay tensors: to
    read one as a number, the host would wait for all that the device has still to do.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        scale: Any
        low: Any
        high: Any
        if _reads_numbers(x):
            scale, low, high = input_levels(step, zero_point, bits)
            out = round_to_levels(x, scale, low, high)
        else:
            scale, zero = step.detach().float(), zero_point.detach().float().round()
            low, high = (limit - zero for limit in activation_range(bits))
            out = (x.float() * (1 / scale)).round_().clamp_(low, high).mul_(scale).to(x.dtype)
        ctx.save_for_backward(x, out)
        ctx.scale, ctx.low, ctx.high = scale, low * scale, high * scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, out = ctx.saved_tensors
        grad = grads[0].to(x.dtype)
        # The range with its ends, which torch's kernel leaves out: half of what a ReLU gives is 0, the lower one.
        hair = 1e-3 * ctx.scale
        if _reads_numbers(x):
            grad_x = torch.ops.aten.hardtanh_backward(grad, x, ctx.low - hair, ctx.high + hair)
        else:
            wide = x.float()
            grad_x = grad * ((wide > ctx.low - hair) & (wide < ctx.high + hair))
        # d out/d step = (out - x)/step inside the range, out/step outside (arXiv:1902.08153, eq. 3);
        # d out/d zero_point = -step outside (arXiv:2004.09576, eq. 6).
        grad_step = (_dot(grad, out) - _dot(grad_x, x)) / ctx.scale
        grad_zero = (grad_x.sum(dtype=torch.float32) - grad.sum(dtype=torch.float32)) * ctx.scale
        return grad_x, grad_step.reshape(()), grad_zero.reshape(()), None


def _reads_numbers(x: Tensor) -> bool:
    """Whether the steps of an input are at hand as numbers: on a CPU, where they make for faster passes."""
    return x.device.type == "cpu"


def input_levels(step: Tensor, zero_point: Tensor, bits: int) -> tuple[float, int, int]:
    """Returns an activation's step, and its smallest and largest integer without the zero point."""
    zero = round(float(zero_point))
    low, high = activation_range(bits)
    return float(step), low - zero, high - zero


def round_to_levels(x: Tensor, scale: float, low: int, high: int) -> Tensor:
    """Quantizes and dequantizes an activation with what `input_levels` gives, without a gradient."""
    return (x * (1 / scale)).round_().clamp_(low, high).mul_(scale)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    # Differences of two such sums are what counts, of which half precision would leave nothing.
    return torch.dot(a.reshape(-1).float(), b.reshape(-1).float())


def fake_quantize_activation(x: Tensor, step: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Quantizes and dequantizes an activation, differentiably in `x`, `step` and `zero_point`.

    Args:
        x: Float, any shape.
        step: Positive float scalar tensor.
        zero_point: Float scalar tensor; it is rounded to an integer.
        bits: 2 to 8.
    """
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x, step, zero_point))
    if torch.compiler.is_compiling() and not trains:
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
    step = ((high - low) / top).clamp(min=SMALLEST_STEP)
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
