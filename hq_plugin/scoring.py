"""Scores policies: the MetaQuantNet generates the weights, held-out data says how close they come.

No training per candidate. BatchNorm statistics depend on the weights, so they are re-estimated for
each policy on a few training samples before it is scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, islice
from typing import Any

import torch
from torch import nn

from hq_plugin import torch_ao
from hq_plugin.data import Batch, Data
from hq_plugin.distillation import Fidelity, LossFunction
from hq_plugin.policy import HybridPolicy
from hq_plugin.sites import foldable


@torch.no_grad()
def recalibrate_batchnorm(network: nn.Module, batches: Sequence[Batch]) -> None:
    """Re-estimates every BatchNorm's running statistics as the plain mean over `batches`."""
    layers: list[Any] = [module for module in network.modules() if foldable(module)]
    if not layers or not batches:
        return
    network.eval()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch's way to ask for a cumulative mean
        layer.train()
    try:
        for batch in batches:
            batch.run(network)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()


#: Fewest samples from which BatchNorm statistics are re-estimated.
_FEWEST = 32


class Scorer:
    """Measures how close a network is to its teacher on the same held-out samples for every policy.

    Args:
        teacher: The float model, in eval mode.
        data: Training data (for BatchNorm) and held-out data.
        loss: The distance.
        samples: Held-out samples that score a candidate of the search.
        recalibration: Samples for BatchNorm, as a share of the samples scored.
    """

    def __init__(
        self, teacher: nn.Module, data: Data, loss: LossFunction, samples: int, recalibration: float
    ) -> None:
        self.teacher, self.loss = teacher, loss
        self.device = next((p.device for p in teacher.parameters()), torch.device("cpu"))
        self.batches = [batch.to(self.device) for batch in data.holdout]
        self.samples = samples
        self.recalibration = recalibration
        with torch.no_grad():
            self.targets = [batch.run(teacher) for batch in self.batches]
        self._data = data
        self._calibration: list[Batch] | None = None

    def calibration(self, samples: int) -> list[Batch]:
        """Returns batches of the first `samples` training samples, or of all if there are fewer."""
        wanted = max(samples, 1)
        if self._calibration is None or sum(b.size for b in self._calibration) < wanted:
            taken: list[Batch] = []
            for batch in self._data.train:
                taken.append(batch.to(self.device))
                if sum(b.size for b in taken) >= wanted:
                    break
            self._calibration = taken
        totals = accumulate(batch.size for batch in self._calibration)
        return [
            batch.take(wanted - (total - batch.size))
            for batch, total in zip(self._calibration, totals, strict=True)
            if total - batch.size < wanted
        ]

    @torch.no_grad()
    def measure(self, network: nn.Module, *, samples: int | None = None) -> Fidelity:
        """Measures a network as it is, in eval mode, on all held-out samples or the first `samples`."""
        network.eval()
        fidelity = Fidelity(self.loss)
        seen = 0
        for batch, target in zip(self.batches, self.targets, strict=True):
            if samples is not None and seen >= samples:
                break
            fidelity.update(batch.run(network), target, batch.labels, batch.size)
            seen += batch.size
        return fidelity

    def score(self, network: nn.Module, policy: HybridPolicy, *, samples: int | None = None) -> Fidelity:
        """Puts a policy in force, recalibrates BatchNorm for it, and measures.

        Args:
            network: The prepared network.
            policy: The policy; it stays in force.
            samples: How many held-out samples to use at least; None takes all.
        """
        torch_ao.apply_policy(network, policy)
        held = sum(batch.size for batch in self.batches)
        samples = held if samples is None else min(samples, held)
        recalibrate_batchnorm(network, self.calibration(max(round(samples * self.recalibration), _FEWEST)))
        return self.measure(network, samples=samples)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Inside, generated weights are cached; afterwards the BatchNorm statistics are as before."""
    layers = [module for module in network.modules() if foldable(module)]
    kept = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]
    try:
        with torch_ao.cached_weights(network):
            yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


def calibrate_activations(network: nn.Module, data: Data, batches: int, device: torch.device) -> None:
    """Runs a prepared network in float on training batches, and sets its activations' steps from them."""
    network.eval()
    with torch.no_grad(), torch_ao.calibrate(network):
        for batch in islice(iter(data.train), batches):
            batch.to(device).run(network)
