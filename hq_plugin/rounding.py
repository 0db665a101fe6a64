"""Good integers to start from: rounding that makes up in later inputs for the error of earlier ones.

Optimal brain quantization of each linear layer by itself (GPTQ, Frantar et al., arXiv:2210.17323, algorithm
1), with the steps and zero points given. Rows of embeddings are rounded in the same way: what stands for the inputs
there are gradients at what was looked up, which say which directions of a row the network minds. Training starts
from the layer's own weight, moved as little as puts it on the integer that was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hq_plugin import torch_ao
from hq_plugin.batch import Batch
from hq_plugin.distillation import LossFunction, random_probe
from hq_plugin.nn.split import same_columns
from hq_plugin.precision import autocast
from hq_plugin.qat_layers import qat_layers
from hq_plugin.quantization import dequantize_weight, per_channel, quantize_weight, weight_range, weight_rows

#: Columns after which the error is carried over to the rest of the weight at once.
_BLOCK = 128
#: What is added to the diagonal, as a share of its mean. GPTQ's 0.01 (section 3.3) fits the few batches that are
#: seen too well: with 1, half of what they say, held-out text came closer (docs/experiments.md).
_DAMPING = 1.0
#: Distance from the edge of an integer's interval at which a moved weight starts, in steps. The first steps of
#: training move every weight by as much as the learning rate, whatever it gains: one that starts on the edge turns
#: back to the nearest integer, and what the rounding gained is lost.
_MARGIN = 0.25
#: Rows that are rounded at once: a vocabulary may have hundreds of thousands.
_ROWS = 16_384


@torch.no_grad()
def input_products(network: nn.Module, names: Iterable[str], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Returns the mean outer product of the inputs of linear layers, float32 `[inputs, inputs]`, by name.

    Args:
        network: Any network; it runs as it is.
        names: Linear layers. Those that never run, or read what is not finite, are left out.
        batches: A few batches.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    running: Batch | None = None

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            assert running is not None
            x = running.without_padding(x, name)
            counts[name] = counts.get(name, 0) + _add_product(sums, name, x)

        return see

    handles = [
        network.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names
    ]
    try:
        for running in batches:
            with autocast():
                running.run(network)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items() if bool(total.isfinite().all())}


def gradient_products(
    network: nn.Module, names: Iterable[str], batches: Iterable[Batch], loss: LossFunction | None = None
) -> dict[str, Tensor]:
    """Returns the outer products of gradients at what embeddings looked up, `[width, width]` float32.

    Gradients of random products of the output, or of the likelihood of labels drawn from its class scores: their
    covariance is how a squared error, or a divergence, bends (the Gauss-Newton matrix). Tables of one embedding
    have one product together, or one for each block of columns.

    Args:
        network: A prepared network; its gradients are lost.
        names: Its embeddings.
        batches: A few batches.
        loss: The distance; None is what suits the output.

    Returns:
        Products by the name of the embedding, or of its tables' together (`same_columns`). Those that no gradient
        reached are left out.
    """
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(gradient: Tensor) -> None:
            _add_product(sums, name, gradient.detach())

        def forward(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad and output.numel():
                output.register_hook(see)

        return forward

    handles = [network.get_submodule(name).register_forward_hook(hook(same_columns(name))) for name in names]
    try:
        with torch.enable_grad():
            for batch in batches if handles else ():
                with autocast():
                    probe, _ = random_probe(batch.run(network), loss)
                if probe.requires_grad:
                    probe.backward()
                network.zero_grad()
    finally:
        for handle in handles:
            handle.remove()
    return {name: total for name, total in sums.items() if bool(total.isfinite().all()) and bool(total.any())}


def _add_product(sums: dict[str, Tensor], name: str, values: Tensor) -> int:
    """Adds the outer products of vectors `[..., width]` to a sum; returns how many vectors there were."""
    flat = values.reshape(-1, values.shape[-1]).float()
    product = flat.T @ flat
    sums[name] = product if name not in sums else sums[name].add_(product)
    return len(flat)


@torch.no_grad()
def second_order_integers(
    weight: Tensor,
    step: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    products: Tensor,
) -> Tensor:
    """Rounds a weight column by column, each column's error made up for in those that follow.

    Args:
        weight: Float, `[outputs, inputs]`.
        step: Positive float, one for each row of `weight_rows(weight, group_size)`.
        zero: Zero points like `step`, or None.
        bits: 1 to 8.
        group_size: Inputs of a group; 0 for whole channels.
        products: `[inputs, inputs]`, mean outer product of the inputs.

    Returns:
        int8, `[outputs, inputs]`.
    """
    outputs, inputs = weight.shape
    size = group_size or inputs
    steps = step.view(outputs, -1)
    zeros = None if zero is None else zero.view(outputs, -1)
    work, found = weight.float().clone(), torch.empty_like(weight, dtype=torch.int8)
    upper = _inverse_factor(products)
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        part, errors = work[:, start:stop].clone(), torch.zeros_like(work[:, start:stop])
        factor = upper[start:stop, start:stop]
        for i in range(stop - start):
            group = (start + i) // size
            scale, offset = steps[:, group], None if zeros is None else zeros[:, group]
            integers = quantize_weight(part[:, i], scale, bits, offset)
            error = (part[:, i] - dequantize_weight(integers, scale, bits, offset)) / factor[i, i]
            part[:, i:] -= error[:, None] * factor[i, i:]
            errors[:, i], found[:, start + i] = error, integers
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return found


def _inverse_factor(products: Tensor) -> Tensor:
    """Returns the upper Cholesky factor of the inverse of the damped products."""
    # Apple's GPUs have no double precision.
    matrix = (products.cpu() if products.device.type == "mps" else products).double().clone()
    diagonal = matrix.diagonal()
    dead = diagonal == 0  # inputs that are always 0
    mean = 1.0 if bool(dead.all()) else float(diagonal[~dead].mean())
    diagonal.masked_fill_(dead, mean)
    damping = _DAMPING
    while True:
        damped = matrix + damping * mean * torch.eye(len(matrix), dtype=matrix.dtype).to(matrix)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
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

    Layers and embeddings that share a weight want different integers, and are left as they are.

    Args:
        network: A prepared network whose layers have tables of one width; changed in place.
        batches: A few batches; of linear layers the float network's inputs are what counts.
        loss: The distance; None is what suits the output.
    """
    batches = list(batches)
    layers: dict[str, Any] = {
        name: layer
        for name, layer in qat_layers(network).items()
        if isinstance(layer, (nn.Linear, nn.Embedding)) and not _is_tied(network, layer)
    }
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    with torch_ao.float_forward(network):
        products = input_products(network, linear, batches)
    for name, product in products.items():
        _round(layers[name], product)
    embeddings = [name for name in layers if name not in linear]
    gradients = gradient_products(network, embeddings, batches, loss)
    for name in embeddings:
        if same_columns(name) in gradients:
            _round(layers[name], gradients[same_columns(name)])


@torch.no_grad()
def _round(layer: Any, product: Tensor) -> None:
    quantizer = layer.weight_fake_quant
    weight, block, bits = layer._parameters["weight"], quantizer.block, quantizer.bits
    if bits == 0:
        return
    step, zero, size = block.step(bits), block.zero_point(bits), block.group_size(bits)
    groups = len(step) // len(weight)
    for start in range(0, len(weight), _ROWS):
        part = weight[start : start + _ROWS]
        own = slice(start * groups, (start + len(part)) * groups)
        scale, offset = step[own], None if zero is None else zero[own]
        integers = second_order_integers(part, scale, offset, bits, size, product)
        rows = weight_rows(part, size)
        part.copy_(inside(rows.float(), weight_rows(integers, size), scale, offset, bits).view_as(part))


def _is_tied(network: nn.Module, layer: nn.Module) -> bool:
    """Whether an embedding and a layer of another kind have one weight."""
    weight = layer._parameters["weight"]
    users = [module for module in network.modules() if module._parameters.get("weight") is weight]
    return len({isinstance(user, nn.Embedding) for user in users}) > 1
