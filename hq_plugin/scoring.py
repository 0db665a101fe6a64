"""Scores policies: the MetaQuantNet generates the weights, held-out data says how close they come.

No training per candidate. BatchNorm statistics depend on the weights, so they are re-estimated for
each policy on a few training samples (`recalibration.py`) before it is scored.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hq_plugin import torch_ao
from hq_plugin.batch import Batch
from hq_plugin.batchnorm import has_statistics
from hq_plugin.data import Data
from hq_plugin.distillation import Fidelity, LossFunction
from hq_plugin.errors import HQWarning
from hq_plugin.memory import out_of_memory
from hq_plugin.policy import HybridPolicy
from hq_plugin.precision import autocast
from hq_plugin.recalibration import Recalibration
from hq_plugin.seeding import seeded
from hq_plugin.sharding import placed, runnable, sharded

#: Sensitivities, of which there are many, are measured on this fraction of the samples of a candidate.
QUICK = 4


class Scorer:
    """Measures how close a network is to its teacher on the same held-out samples for every policy.

    Args:
        teacher: The float model, in eval mode.
        data: Training data (for BatchNorm) and held-out data.
        loss: The distance.
        samples: Held-out samples that score a candidate of the search; `quick`, a part of them, a sensitivity.
        recalibration: Samples on which BatchNorm statistics are re-estimated for each policy.
        seed: Of what is random in reading the data.
    """

    def __init__(
        self, teacher: nn.Module, data: Data, loss: LossFunction, samples: int, recalibration: int, seed: int = 0
    ) -> None:
        self.teacher, self.loss = teacher, loss
        self._running: nn.Module | None = None
        self.device = next((p.device for p in teacher.parameters()), torch.device("cpu"))
        if sharded():
            self.device = Accelerator().device
        self.samples, self.quick = samples, max(samples // QUICK, 1)
        self.batches = [batch.to(self.device) for batch in data.holdout]
        self.recalibration = recalibration
        # Outputs of the float model: for the samples of a candidate, and for all others that are small.
        self._targets: dict[int, Any] = {}
        self._data = data
        self._recalibrations: dict[int, Recalibration] = {}
        self._parts, self._seed = 1, seed

    def recalibrate(self, network: nn.Module, samples: int | None = None) -> None:
        """Re-estimates a network's BatchNorm statistics on training samples.

        Args:
            network: A network with the teacher's layers.
            samples: How many; None takes those of a candidate. If there are fewer, all.
        """
        if not any(has_statistics(module) for module in self.teacher.modules()):
            return
        samples = self.recalibration if samples is None else samples
        if samples not in self._recalibrations:
            # Data may be augmented at random; which samples these are must not hang on what was read before.
            with seeded(self._seed):
                first = list(self._first(samples))
            self._recalibrations[samples] = Recalibration(self.teacher, first)
        self._recalibrations[samples](network)

    def _first(self, samples: int) -> Iterator[Batch]:
        """Yields the first training samples, the last batch cut to fit where the model takes a part of it.

        It is never cut to one sample, which has no variance where a layer's output is 1 x 1.
        """
        wanted = samples
        for batch in self._data.train:
            if samples <= 0 or (samples == 1 and wanted > 1):
                return
            batch = batch.to(self.device)
            yield batch if batch.size <= samples else batch.taken_by(runnable(self.teacher), samples)
            samples -= batch.size

    @torch.no_grad()
    def measure(self, network: nn.Module, *, samples: int | None = None) -> Fidelity:
        """Measures a network as it is, in eval mode, on all held-out samples or the first `samples`."""
        network.eval()
        fidelity = Fidelity(self.loss)
        seen = 0
        for number, batch in enumerate(self.batches):
            if samples is not None and seen >= samples:
                break
            with autocast():
                output = self._run(network, batch)
                target = self._target(number, batch)
            if seen < self.samples or _smaller(target, batch):
                self._targets[number] = target
            fidelity.update(output, target, batch.labels, batch.size)
            seen += batch.size
        return fidelity

    def forget_targets(self) -> None:
        """Frees what can be had again, before memory is needed: the float model's outputs, and training samples.

        Of a language model outputs are as large as its weights. Small ones stay.
        """
        self._targets = {n: kept for n, kept in self._targets.items() if _smaller(kept, self.batches[n])}
        self._recalibrations = {n: kept for n, kept in self._recalibrations.items() if n == self.recalibration}
        self._running = None

    def _target(self, number: int, batch: Batch) -> Any:
        """Returns the float model's output for one of the batches."""
        if number in self._targets:
            return self._targets[number]
        if self._running is None:
            self._running = runnable(self.teacher)
        return self._run(self._running, batch)

    def _run(self, model: nn.Module, batch: Batch) -> Any:
        """Runs a model on a batch; where memory is too little, in smaller parts from then on.

        In eval mode no sample depends on another, so that the parts' outputs together are the batch's.
        """
        while True:
            try:
                size = -(-batch.size // self._parts)
                parts = [batch.part(at, min(at + size, batch.size)) for at in range(0, batch.size, size)]
                return parts[0].run(model) if len(parts) == 1 else _joined([part.run(model) for part in parts])
            except (RuntimeError, MemoryError) as error:
                # Where each forward takes all processes, one cannot have more of them than the others.
                if not out_of_memory(error) or self._parts >= batch.size or sharded():
                    raise
            clear_device_cache(garbage_collection=True)
            if self._parts == 1:
                warnings.warn(
                    f"Memory is too little to score a batch of {batch.size} samples at once: from here on it is "
                    "done in parts. Scores stay the same.",
                    HQWarning,
                    stacklevel=4,
                )
            self._parts *= 2

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
        self.recalibrate(network)
        return self.measure(network, samples=samples)


def _smaller(target: Any, batch: Batch) -> bool:
    """Whether an output takes less memory than the inputs that it comes from, which are kept as well."""
    leaves = tree_leaves(target)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return False  # it holds what nobody knows the size of
    inputs = [leaf for leaf in tree_leaves((batch.args, batch.kwargs)) if isinstance(leaf, Tensor)]
    return sum(leaf.nbytes for leaf in leaves) < sum(leaf.nbytes for leaf in inputs)


def _joined(outputs: list[Any]) -> Any:
    """Joins the outputs of the parts of a batch: tensors along the samples, what has none as in the first."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs) if first.dim() else first
    if isinstance(first, Mapping):
        return {name: _joined([output[name] for output in outputs]) for name in first}
    if isinstance(first, (tuple, list)):
        return [_joined(list(parts)) for parts in zip(*outputs, strict=True)]
    logits = getattr(first, "logits", None)
    return {"logits": _joined([output.logits for output in outputs])} if isinstance(logits, Tensor) else first


@contextmanager
def evaluating(network: nn.Module) -> Iterator[nn.Module]:
    """Gives what is to be scored in place of a network; afterwards its statistics and calibration are as before.

    Generated weights are cached, unless they are in pieces.
    """
    if sharded():
        with placed(network) as shell:
            yield shell
        return
    layers = [module for module in network.modules() if has_statistics(module)]
    kept = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]
    try:
        # Which policies are scored hangs on what is known from before a kill, and on the number of processes.
        with torch_ao.cached_weights(network), torch_ao.calibration_kept(network):
            yield network
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


def calibrate_activations(network: nn.Module, data: Data, batches: int, device: torch.device) -> None:
    """Runs a prepared network in float on training batches, and sets its activations' steps from them."""
    network.eval()
    with torch.no_grad(), torch_ao.calibrate(network):
        for batch in islice(iter(data.train), batches):
            batch.to(device).run(network)
