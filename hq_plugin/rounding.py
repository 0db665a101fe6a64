"""Good integers to start from: rounding that makes up in later inputs for the error of earlier ones.

Optimal brain quantization of each layer by itself (GPTQ, Frantar et al., arXiv:2210.17323, algorithm 1), with the
steps and zero points given. Each group of a convolution is a matrix of its own; rows of embeddings are rounded by
what the network minds (`outer_products.py`). Training starts from the layer's own weight, moved as little as puts
it on the integer that was found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hq_plugin import torch_ao
from hq_plugin.batch import Batch
from hq_plugin.distillation import LossFunction
from hq_plugin.nn.split import same_columns
from hq_plugin.outer_products import MULTIPLYING, gradient_products, input_products
from hq_plugin.qat_layers import qat_layers
from hq_plugin.quantization import dequantize_weight, per_channel, quantize_weight, weight_range, weight_rows

#: Columns after which the error is carried over to the rest of the weight at once.
_BLOCK = 128
#: What is added to the diagonal, as a share of its mean. GPTQ's 0.01 (section 3.3) fits the few batches that are
#: seen too well: with 1, half of what they say, held-out text came closer. A convolution sees thousands of places
#: of each batch, and its inputs are more alike (docs/experiments.md).
_DAMPING, _CONVOLVED = 1.0, 0.1
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
    products: Tensor,
    damping: float = _DAMPING,
) -> Tensor:
    """Rounds weights column by column, each column's error made up for in those that follow.

    Args:
        weight: Float, `[groups, outputs, inputs]`.
        step: Positive float, one for each row of `weight_rows(weight.flatten(0, 1), group_size)`.
        zero: Zero points like `step`, or None.
        bits: 1 to 8.
        group_size: Inputs of a row; 0 for all.
        products: `[groups, inputs, inputs]`, mean outer product of the inputs.
        damping: What is added to their diagonal, as a share of its mean.

    Returns:
        int8, `[groups, outputs, inputs]`.
    """
    groups, outputs, inputs = weight.shape
    size = group_size or inputs
    steps = step.view(groups, outputs, -1)
    zeros = None if zero is None else zero.view(groups, outputs, -1)
    work, found = weight.float().clone(), torch.empty_like(weight, dtype=torch.int8)
    upper = _inverse_factor(products, damping)
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


def _inverse_factor(products: Tensor, damping: float) -> Tensor:
    """Returns the upper Cholesky factors of the inverses of the damped products."""
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


def start_from_good_integers(
    network: nn.Module, batches: Iterable[Batch], loss: LossFunction | None = None
) -> None:
    """Moves the weights of a network with a fixed policy onto integers found to second order.

    Layers that share a weight are rounded once, by what all of them multiply. A layer and an embedding that share
    one want different integers, and are left as they are.

    Args:
        network: A prepared network whose layers have tables of one width; changed in place.
        batches: A few batches; what layers multiply in the float network is what counts.
        loss: The distance; None is what suits the output.
    """
    batches = list(batches)
    layers: dict[str, Any] = {
        name: layer
        for name, layer in qat_layers(network).items()
        if isinstance(layer, (*MULTIPLYING, nn.Embedding)) and not _is_tied(network, layer)
    }
    multiplying = [name for name, layer in layers.items() if isinstance(layer, MULTIPLYING)]
    with torch_ao.float_forward(network):
        products = input_products(network, multiplying, batches)
    _round_all(layers, products)
    embeddings = [name for name in layers if name not in multiplying]
    gradients = gradient_products(network, embeddings, batches, loss)
    _round_all(
        layers, {name: gradients[same_columns(name)] for name in embeddings if same_columns(name) in gradients}
    )


def _round_all(layers: Mapping[str, Any], products: Mapping[str, Tensor]) -> None:
    """Rounds layers by their products; those that share a weight once, by the sum of theirs."""
    sharing: dict[int, list[str]] = {}
    for name in products:
        sharing.setdefault(id(layers[name]._parameters["weight"]), []).append(name)
    for names in sharing.values():
        layer, product = layers[names[0]], products[names[0]]
        if all(products[name].shape == product.shape for name in names):
            for name in names[1:]:
                product = product + products[name]
            _round(layer, product, _CONVOLVED if isinstance(layer, (nn.Conv1d, nn.Conv2d)) else _DAMPING)


@torch.no_grad()
def _round(layer: Any, products: Tensor, damping: float) -> None:
    quantizer = layer.weight_fake_quant
    weight, block, bits = layer._parameters["weight"], quantizer.block, quantizer.bits
    if bits == 0:
        return
    step, zero, size = block.step(bits), block.zero_point(bits), block.group_size(bits)
    matrices = weight.reshape(len(products), -1, products.shape[-1])
    matrices = matrices.clone(memory_format=torch.contiguous_format)  # a weight may be stored transposed
    steps = step.view(*matrices.shape[:2], -1)
    zeros = None if zero is None else zero.view_as(steps)
    for start in range(0, matrices.shape[1], _ROWS):
        own = slice(start, start + _ROWS)
        part, scale = matrices[:, own], steps[:, own].flatten()
        offset = None if zeros is None else zeros[:, own].flatten()
        integers = second_order_integers(part, scale, offset, bits, size, products, damping)
        rows = weight_rows(part.flatten(0, 1), size)
        moved = inside(rows.float(), integers.view_as(rows), scale, offset, bits)
        part.copy_(moved.view_as(part))
    weight.copy_(matrices.view_as(weight))


def _is_tied(network: nn.Module, layer: nn.Module) -> bool:
    """Whether an embedding and a layer of another kind have one weight."""
    weight = layer._parameters["weight"]
    users = [module for module in network.modules() if module._parameters.get("weight") is weight]
    return len({isinstance(user, nn.Embedding) for user in users}) > 1
