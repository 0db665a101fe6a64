"""The best steps and zero points: searches for the smallest squared error, in the precision that is stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hq_plugin.quantization import (
    SMALLEST_STEP,
    activation_range,
    per_channel,
    shift_of,
    weight_offset,
    weight_range,
    weight_rows,
)
from hq_plugin.stored_qparams import stored_step, stored_zero

#: The widest range that is tried for a group, as a share of that of its values.
_BEYOND = 1.06
#: Weights worked on at once: the few temporaries of a search fit a processor's cache.
_CHUNK = 1 << 16


def optimal_weight_step(weight: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Searches, row by row, the step with the smallest squared error.

    Args:
        weight: Float, `[rows, ...]`.
        bits: 0 to 8; at 0 any step will do.
        importance: Non-negative, broadcastable to `[rows, inputs]`: the weight of each squared error.

    Returns:
        Positive float32, `[rows]`, already rounded to the stored precision.
    """
    if bits == 0:
        return torch.ones(len(weight), device=weight.device)
    return stored_step(
        torch.cat([_row_step(rows, bits, weights) for rows, weights in _row_chunks(weight, importance)])
    )


def _row_step(flat: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    largest = flat.abs().amax(1).clamp_min(SMALLEST_STEP)
    top = weight_range(bits)[1] + weight_offset(bits)
    if bits == 1:
        # ±step/2 with the least squared error is ± the mean magnitude (XNOR-Net, arXiv:1603.05279).
        mean = flat.abs().mean(1) if importance is None else _weighted(flat.abs(), importance)
        return stored_step((2 * mean).clamp_min(SMALLEST_STEP))
    best = largest / top
    best_error = torch.full_like(best, float("inf"))
    for fraction in torch.linspace(0.15, 1.2, 48).tolist():
        step = stored_step((largest * fraction / top).clamp_min(SMALLEST_STEP))
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
    step, zero, error = _pulled_in(flat, low, high, bits, importance, whole)
    if bool(((low > 0) | (high < 0)).any()):
        # Zero points that can be stored lie in the range: a row of one sign may want one that reaches to 0.
        other = _pulled_in(flat, low.clamp(max=0), high.clamp(min=0), bits, importance, whole)
        better = other[2] < error
        step, zero = torch.where(better, other[0], step), torch.where(better, other[1], zero)
    return step, zero


def _pulled_in(
    flat: Tensor, low: Tensor, high: Tensor, bits: int, importance: Tensor | None, whole: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the best steps, zero points and their errors, beginning with ranges between `low` and `high`."""
    levels, lowest = 2**bits - 1, weight_range(bits)[0] + weight_offset(bits)

    def qparams(bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        step = stored_step(((top - bottom) / levels).clamp_min(SMALLEST_STEP))
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
    return best_step, best_zero, best_error


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


def _row_chunks(weight: Tensor, importance: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    flat = weight.detach().float().flatten(1)
    rows = max(1, _CHUNK // max(1, flat.shape[1]))
    spread = None if importance is None else importance.expand(flat.shape[0], -1)
    for start in range(0, max(1, flat.shape[0]), rows):
        stop = start + rows
        yield flat[start:stop], None if spread is None else spread[start:stop]


def _weight_error(flat: Tensor, step: Tensor, bits: int, zero: Tensor | None, importance: Tensor | None) -> Tensor:
    low, high = weight_range(bits)
    shift, scale = shift_of(zero, flat, bits), per_channel(step, flat)
    error = (flat / scale).sub_(shift).round_().clamp_(low, high).add_(shift).mul_(scale).sub_(flat).square_()
    return error.sum(1) if importance is None else error.mul_(importance).sum(1)


def _weighted(values: Tensor, importance: Tensor) -> Tensor:
    weights = importance.expand_as(values)
    return (values * weights).sum(1) / weights.sum(1).clamp_min(SMALLEST_STEP)


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
    if high - low < SMALLEST_STEP:
        return 1.0 / levels, 0.0
    samples = samples.detach().float()
    best, best_error = ((high - low) / levels, 0.0), float("inf")
    for fraction in torch.linspace(0.05, 1.0, candidates).tolist():
        # Sides shrink together; one that is short already (a SiLU's negative side) is kept.
        for below in {low * fraction, max(low, -high * fraction)}:
            step = max((high * fraction - below) / levels, SMALLEST_STEP)
            zero = min(max(round(-below / step), 0), levels)
            rounded = (samples / step).round().clamp(-zero, levels - zero) * step
            error = float((rounded - samples).square().sum())
            if error < best_error:
                best, best_error = (step, float(zero)), error
    return best
