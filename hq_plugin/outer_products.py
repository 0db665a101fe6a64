"""Outer products of what layers multiply: which errors of a weight cancel in its outputs (`rounding.py`).

Of linear layers and convolutions it is the inputs' (of a convolution those that each output is computed from); of
embeddings, which have none, gradients at what was looked up say which directions of a row the network minds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_plugin.batch import Batch, first_input
from hq_plugin.distillation import LossFunction, random_probe
from hq_plugin.modes import differentiable
from hq_plugin.nn.split import same_columns
from hq_plugin.precision import autocast

#: Layers whose outputs are products with their inputs.
MULTIPLYING = (nn.Linear, nn.Conv1d, nn.Conv2d)
#: Places of a convolution's output that are seen of each batch, at most, and values that they read.
_PLACES, _VALUES = 4096, 1 << 24


@torch.no_grad()
def input_products(network: nn.Module, names: Iterable[str], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Returns the mean outer product of the inputs of layers, float32 `[groups, inputs, inputs]`, by name.

    Args:
        network: Any network; it runs as it is.
        names: Layers of the classes `MULTIPLYING`. Those that never run, or read nothing or what is not finite, are
            left out, and so are subclasses of which it cannot be told what they multiply their weight with.
        batches: A few batches.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    unknown: set[str] = set()
    running: Batch | None = None

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert running is not None
            vectors = multiplied(module, first_input(args, kwargs), running, name)
            if vectors is None:
                unknown.add(name)
                return
            counts[name] = counts.get(name, 0) + vectors.shape[1]
            _add_products(sums, name, vectors)

        return see

    handles = [
        network.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names
    ]
    try:
        for running in batches if handles else ():
            with autocast():
                running.run(network)
    finally:
        for handle in handles:
            handle.remove()
    known = [name for name, count in counts.items() if count and name not in unknown]
    return {name: sums[name] / counts[name] for name in known if bool(sums[name].isfinite().all())}


def multiplied(layer: nn.Module, x: Any, batch: Batch, name: str) -> Tensor | None:
    """Returns what a layer multiplies its weight with, `[groups, vectors, inputs]`; None where that cannot be told.

    Args:
        layer: Of one of the classes `MULTIPLYING`.
        x: What it is called with first.
        batch: The batch that runs; its padding is left out.
        name: The layer's.
    """
    if not _multiplies(layer, x):
        return None
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return convolved(x.detach(), layer)
    return batch.without_padding(x.detach(), name).reshape(1, -1, x.shape[-1])  # type: ignore[no-any-return]


def _multiplies(layer: nn.Module, x: Any) -> bool:
    """Whether the weight fits an input as the layer's class multiplies them.

    A subclass may take something else, multiply by a part of its weight, or pad a small picture itself.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        weight: Any = layer._parameters["weight"]
        return x.shape[-1:] == weight.shape[1:]
    spatial = len(layer.kernel_size)
    reach = [(size - 1) * dilation for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
    padding = layer._reversed_padding_repeated_twice[::-1]
    sizes = [n + sum(padding[2 * i : 2 * i + 2]) for i, n in enumerate(x.shape[-spatial:])]
    return (
        x.dim() in (spatial + 1, spatial + 2)
        and x.shape[-spatial - 1] == layer.in_channels
        and all(size > far for size, far in zip(sizes, reach, strict=True))
    )


def convolved(x: Tensor, layer: nn.Conv1d | nn.Conv2d) -> Tensor:
    """Returns what a convolution multiplies its weight with, at some places of its output.

    Args:
        x: Its input, `[samples, channels, ...]`, or of one sample `[channels, ...]`.
        layer: The convolution.

    Returns:
        `[groups, places, inputs]`; inputs are in the order of the weight of an output, flattened. Of more than
        `_PLACES` places, or than read `_VALUES` values, it is as many that lie evenly.
    """
    spatial = len(layer.kernel_size)
    x = x if x.dim() == spatial + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    patches = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        patches = patches.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    places = patches.movedim(1, spatial + 1)  # a view still: [samples, *output, channels, *kernel]
    shape, reads = places.shape[: spatial + 1], places.shape[spatial + 1 :].numel()
    count = shape.numel()
    kept = min(count, _PLACES, max(1, _VALUES // reads))
    chosen = torch.arange(kept, device=x.device) * count // max(kept, 1)
    found = places[torch.unravel_index(chosen, shape)]
    return found.reshape(kept, layer.groups, reads // layer.groups).transpose(0, 1)


def gradient_products(
    network: nn.Module, names: Iterable[str], batches: Iterable[Batch], loss: LossFunction | None = None
) -> dict[str, Tensor]:
    """Returns the outer products of gradients at what embeddings looked up, `[1, width, width]` float32.

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
            _add_products(sums, name, gradient.detach().reshape(1, -1, gradient.shape[-1]))

        def forward(module: nn.Module, args: Any, output: Tensor) -> None:
            weight: Any = module._parameters["weight"]
            # A subclass may give something else than what it looked up.
            if isinstance(output, Tensor) and output.requires_grad and output.shape[-1:] == weight.shape[1:]:
                output.register_hook(see)

        return forward

    handles = [network.get_submodule(name).register_forward_hook(hook(same_columns(name))) for name in names]
    try:
        with torch.enable_grad(), differentiable(network):
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


def _add_products(sums: dict[str, Tensor], name: str, vectors: Tensor) -> None:
    """Adds the outer products of vectors `[groups, vectors, width]` to a sum."""
    flat = vectors.float()
    product = flat.transpose(1, 2) @ flat
    sums[name] = product if name not in sums else sums[name].add_(product)
