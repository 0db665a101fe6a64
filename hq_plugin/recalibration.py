"""Re-estimates the statistics of BatchNorm layers for weights that are not those they were taken from.

What a network computes at low widths hangs on them: stale statistics cost more than the rounding itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hq_plugin.batch import Batch, first_input
from hq_plugin.batchnorm import has_statistics
from hq_plugin.sharding import runnable

_TINY = 1e-12


@dataclass(frozen=True)
class Statistics:
    """Mean and variance of every channel at one BatchNorm layer's input, `[channels]` each."""

    mean: Tensor
    variance: Tensor

    def moved(self, sampled: Statistics, seen: Statistics) -> Statistics:
        """Returns these statistics of the float model, moved by what another network's differ by on a sample.

        Args:
            sampled: The float model's on the sample.
            seen: The other network's on the same.
        """
        ratio = seen.variance / sampled.variance.clamp_min(_TINY)
        # A channel that is constant on the sample says nothing about its ratio.
        variance = torch.where(sampled.variance > _TINY, self.variance * ratio, seen.variance)
        return Statistics(self.mean + seen.mean - sampled.mean, variance)

    def write(self, norm: Any) -> None:
        """Makes them the running statistics of a BatchNorm layer."""
        norm.running_mean.copy_(self.mean)
        norm.running_var.copy_(self.variance)


def _batchnorms(network: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in network.named_modules() if has_statistics(module)}


@torch.no_grad()
def statistics_of(norm: Any, inputs: Sequence[Any]) -> Statistics | None:
    """Returns the statistics of what a BatchNorm layer is called with, or None where there is no variance.

    Args:
        norm: The layer, which is not changed: how it reads its input is its class's own.
        inputs: What it is called with first; their statistics' mean is taken, as in `measured_statistics`.
    """
    layer, seen = copy.deepcopy(norm), 0
    layer.reset_running_stats()
    layer.train()
    for x in inputs:
        if isinstance(x, Tensor) and x.numel() > layer.num_features:
            seen += x.numel()
            layer.momentum = x.numel() / seen
            layer(x)
    found = Statistics(layer.running_mean, layer.running_var)
    return found if seen and bool(found.mean.isfinite().all() and found.variance.isfinite().all()) else None


@torch.no_grad()
def measured_statistics(network: nn.Module, batches: Sequence[Batch]) -> dict[str, Statistics]:
    """Measures what enters each BatchNorm layer while all of them normalise by the batch's statistics.

    Args:
        network: Any network; only the running statistics of its BatchNorm layers change.
        batches: The batches; of their statistics the mean is taken, each weighted by how much it is of.
    """
    layers = _batchnorms(network)
    network.eval()
    momenta = {name: layer.momentum for name, layer in layers.items()}
    seen = dict.fromkeys(layers.values(), 0)

    def weigh(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Torch's own cumulative mean has a last, smaller batch count as much as the others.
        values = first_input(args, kwargs).numel()
        seen[layer] += values
        layer.momentum = values / max(seen[layer], 1)

    hooks = [layer.register_forward_pre_hook(weigh, with_kwargs=True) for layer in layers.values()]
    for layer in layers.values():
        layer.reset_running_stats()
        layer.train()
    try:
        for batch in batches:
            batch.run(network)
    finally:
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            layer.momentum = momenta[name]
            layer.eval()
    return {
        name: Statistics(layer.running_mean.clone(), layer.running_var.clone()) for name, layer in layers.items()
    }


class Recalibration:
    """Re-estimates BatchNorm statistics, which depend on the weights, from few samples.

    The float model knows its statistics from all its training data. What a network's differ by is measured
    on a few samples, on which both run: the noise of the sample is nearly the same in the two and cancels
    (a control variate). Means take over the difference, variances the ratio.

    Args:
        teacher: The float model; it is not changed.
        batches: The samples.
    """

    def __init__(self, teacher: nn.Module, batches: Sequence[Batch]) -> None:
        self.batches = list(batches)
        self._known = {
            name: Statistics(layer.running_mean.clone(), layer.running_var.clone())
            for name, layer in _batchnorms(teacher).items()
        }
        self._sampled = measured_statistics(runnable(copy.deepcopy(teacher)), self.batches) if self._known else {}

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> None:
        """Sets the running statistics of a network with the teacher's layers."""
        if not self._known:
            return
        layers = _batchnorms(network)
        for name, seen in measured_statistics(network, self.batches).items():
            self._known[name].moved(self._sampled[name], seen).write(layers[name])
