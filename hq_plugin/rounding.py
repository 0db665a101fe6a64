"""Good integers for one layer: rounding that makes up in later inputs for the error of earlier ones.

Optimal brain quantization (GPTQ, Frantar et al., arXiv:2210.17323, algorithm 1), with the steps and zero points
given. Each group of a convolution is a matrix of its own. Training starts from the layer's own weight, refitted to
its inputs and moved as little as puts it on the integer that was found. What these are of, `sequential_rounding.py`
finds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hq_plugin.quantization import dequantize_weight, per_channel, quantize_weight, weight_range, weight_rows

#: Columns after which the error is carried over to the rest of the weight at once.
_BLOCK = 128
#: Distance from the edge of an integer's interval at which a moved weight starts, in steps. The first steps of
#: training move every weight by as much as the learning rate, whatever it gains: one that starts on the edge turns
#: back to the nearest integer, and what the rounding gained is lost.
_MARGIN = 0.25
#: Rows that are rounded at once: a vocabulary may have hundreds of thousands.
_ROWS = 16_384


@torch.no_grad()
def second_order_integers(
    weight: Tensor,
    step: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    upper: Tensor,
) -> Tensor:
    """Rounds weights column by column, each column's error made up for in those that follow.

    Args:
        weight: Float, `[groups, outputs, inputs]`.
        step: Positive float, one for each row of `weight_rows(weight.flatten(0, 1), group_size)`.
        zero: Zero points like `step`, or None.
        bits: 1 to 8.
        group_size: Inputs of a row; 0 for all.
        upper: `[groups, inputs, inputs]`, the `inverse_factor` of the mean outer product of the inputs.

    Returns:
        int8, `[groups, outputs, inputs]`.
    """
    groups, outputs, inputs = weight.shape
    size = group_size or inputs
    steps = step.view(groups, outputs, -1)
    zeros = None if zero is None else zero.view(groups, outputs, -1)
    work, found = weight.float().clone(), torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        part, errors = work[..., start:stop].clone(), torch.zeros_like(work[..., start:stop])
        factor = upper[:, start:stop, start:stop]
        for i in range(stop - start):
            row = (start + i) // size
            scale, offset = steps[..., row].flatten(), None if zeros is None else zeros[..., row].flatten()
            column = part[..., i]
            integers = quantize_weight(column.flatten(), scale, bits, offset)
            rounded = dequantize_weight(integers, scale, bits, offset).view_as(column)
            error = (column - rounded) / factor[:, i, i, None]
            part[..., i:] -= error[..., None] * factor[:, i, None, i:]
            errors[..., i], found[..., start + i] = error, integers.view_as(column)
        work[..., stop:] -= errors @ upper[:, start:stop, stop:]
    return found


def inverse_factor(products: Tensor, damping: float) -> Tensor:
    """Returns the upper Cholesky factors of the inverses of damped outer products.

    Args:
        products: `[groups, inputs, inputs]`.
        damping: What is added to their diagonal, as a share of its mean; more where they are singular still.

    Returns:
        float32, the shape of `products`.
    """
    # Apple's GPUs have no double precision.
    matrix = (products.cpu() if products.device.type == "mps" else products).double().clone()
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0  # inputs that are always 0
    alive = (~dead).sum(-1, keepdim=True)
    mean = torch.where(alive > 0, diagonal.sum(-1, keepdim=True) / alive.clamp_min(1), 1.0)
    diagonal.copy_(torch.where(dead, mean, diagonal))
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    while True:
        lower, failed = torch.linalg.cholesky_ex(matrix + damping * mean[..., None] * eye)
        if not bool(failed.any()):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed.any()):
                return upper.float().to(products.device)
        damping *= 10


@torch.no_grad()
def inside(weight: Tensor, integers: Tensor, step: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Moves each weight as little as makes it round to a given integer.

    Args:
        weight: Float, `[rows, inputs]`.
        integers: int8, the shape of `weight`.
        step: `[rows]`.
        zero: `[rows]` or None.
        bits: 1 to 8.
    """
    scale = per_channel(step, weight)
    middle = dequantize_weight(integers, step, bits, zero)
    half = (0.5 - _MARGIN) * scale
    low, high = weight_range(bits)
    # Beyond the ends of the range everything rounds to the last integer.
    below = torch.where(integers == low, torch.full_like(middle, -torch.inf), middle - half)
    above = torch.where(integers == high, torch.full_like(middle, torch.inf), middle + half)
    return torch.minimum(torch.maximum(weight, below), above)


@torch.no_grad()
def round_layer(layer: Any, products: Tensor, damping: float, missing: Tensor | None = None) -> None:
    """Moves the weight of a layer in training, which has one width, onto integers found to second order.

    Args:
        layer: The layer.
        products: `[groups, inputs, inputs]`, mean outer product of its inputs `x`.
        damping: As for `inverse_factor`.
        missing: The same shape, mean outer product of what its inputs lack of those that are meant, `y - x`, and
            `x`. The weight is first refitted, so that its products with `x` come closest to the old ones with `y`
            (quantization error propagation, Arai and Ichikawa, arXiv:2504.09629), damped as the rounding is.
    """
    quantizer = layer.weight_fake_quant
    weight, block, bits = layer._parameters["weight"], quantizer.block, quantizer.bits
    if bits == 0:
        return
    upper = inverse_factor(products, damping)
    step, zero, size = block.step(bits), block.zero_point(bits), block.group_size(bits)
    matrices = weight.reshape(len(products), -1, products.shape[-1])
    matrices = matrices.clone(memory_format=torch.contiguous_format)  # a weight may be stored transposed
    if missing is not None:
        matrices += (matrices.float() @ missing @ upper.transpose(1, 2) @ upper).to(matrices.dtype)
    steps = step.view(*matrices.shape[:2], -1)
    zeros = None if zero is None else zero.view_as(steps)
    for start in range(0, matrices.shape[1], _ROWS):
        own = slice(start, start + _ROWS)
        part, scale = matrices[:, own], steps[:, own].flatten()
        offset = None if zeros is None else zeros[:, own].flatten()
        integers = second_order_integers(part, scale, offset, bits, size, upper)
        rows = weight_rows(part.flatten(0, 1), size)
        moved = inside(rows.float(), integers.view_as(rows), scale, offset, bits)
        part.copy_(moved.view_as(part))
    weight.copy_(matrices.view_as(weight))
