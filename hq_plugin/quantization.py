"""The quantization function: floats to integers of a given width and back, and its gradients.

Weights are quantized symmetrically with one step a channel (axis 0), activations affinely with one
step and one integer zero point a tensor. Steps are learned (LSQ, Esser et al., arXiv:1902.08153;
zero points as in LSQ+, arXiv:2004.09576). Everything here is a pure function of tensors: no module,
no state, no policy.

Integer ranges, for b bits:

====================  ======================  =================================
what                  integers                value
====================  ======================  =================================
weights, b >= 3       -2^(b-1) .. 2^(b-1)-1   `integer * step`
weights, b <= 2       -2^(b-1) .. 2^(b-1)-1   `(integer + 1/2) * step`
activations           0 .. 2^b-1              `(integer - zero_point) * step`
====================  ======================  =================================

The half step at 1 and 2 bits makes the few levels symmetric: binary weights are ±step/2, and at 2
bits the four levels ±step/2, ±3step/2 fit a bell-shaped channel better than LSQ's -2, -1, 0, 1
(a uniform quantizer without a zero level is the optimal one for a Gaussian at 2 bits).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Steps are stored in bfloat16: the range of float32 in two bytes. Training sees the rounding.
STEP_DTYPE = torch.bfloat16
STEP_BYTES = 2
#: Bytes of an activation's float32 step and int32 zero point.
ACTIVATION_QPARAM_BYTES = 8

_SMALLEST_STEP = 1e-12


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
    """Rounds a step to the precision in which it is stored; the gradient passes straight through."""
    return step + (step.detach().to(STEP_DTYPE).to(step.dtype) - step.detach())


def quantize_weight(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """Quantizes a weight to integers.

    Args:
        weight: Float, `[channels, ...]`.
        step: Positive float, `[channels]`.
        bits: 1 to 8.

    Returns:
        int8, the shape of `weight`, inside `weight_range(bits)`.
    """
    low, high = weight_range(bits)
    scaled = weight / per_channel(step, weight) - weight_offset(bits)
    return scaled.round().clamp_(low, high).to(torch.int8)


def dequantize_weight(integers: Tensor, step: Tensor, bits: int) -> Tensor:
    """Returns the float values of `integers`, in the dtype of `step`; inverse of `quantize_weight`."""
    return (integers.to(step.dtype) + weight_offset(bits)) * per_channel(step, integers)


def fake_quantize_weight(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """Quantizes and dequantizes a weight, differentiably in the weight and the step.

    The forward value equals `dequantize_weight(quantize_weight(...))` bit for bit. The gradient is
    LSQ's (arXiv:1902.08153, eq. 3 and 5), scaled by 1/sqrt(elements * largest integer) for the step.

    Args:
        weight: Float, `[channels, ...]`.
        step: Positive float, `[channels]`.
        bits: 1 to 8.
    """
    low, high = weight_range(bits)
    offset = weight_offset(bits)
    broadcast = per_channel(step, weight)
    integers = round_ste(weight / broadcast - offset).clamp(low, high)
    # Straight-through arithmetic leaves rounding dust (x + (round(x) - x)); the second, detached
    # rounding removes it, so that training sees exactly what is stored.
    integers = integers + (integers.detach().round() - integers.detach())
    return (integers + offset) * broadcast


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
    return _FakeQuantizeActivation.apply(x, step, zero_point, bits)  # type: ignore[no-any-return]


def optimal_weight_step(weight: Tensor, bits: int, candidates: int = 48) -> Tensor:
    """Searches, channel by channel, the step with the smallest squared error.

    Args:
        weight: Float, `[channels, ...]`.
        bits: 1 to 8.
        candidates: How many clipping points between 0 and the largest magnitude are tried.

    Returns:
        Positive float32, `[channels]`, already rounded to the stored precision.
    """
    flat = weight.detach().float().flatten(1)
    largest = flat.abs().amax(1).clamp_min(_SMALLEST_STEP)
    top = weight_range(bits)[1] + weight_offset(bits)
    if bits == 1:
        # ±step/2 with the least squared error is ± the mean magnitude (XNOR-Net, arXiv:1603.05279).
        return stored_step((2 * flat.abs().mean(1)).clamp_min(_SMALLEST_STEP))
    best = largest / top
    best_error = torch.full_like(best, float("inf"))
    for fraction in torch.linspace(0.15, 1.2, candidates).tolist():
        step = stored_step((largest * fraction / top).clamp_min(_SMALLEST_STEP))
        error = (dequantize_weight(quantize_weight(flat, step, bits), step, bits) - flat).square().sum(1)
        better = error < best_error
        best, best_error = torch.where(better, step, best), torch.where(better, error, best_error)
    return best


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
