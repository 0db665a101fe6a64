"""The blocks of a network: what each of them gives, the student is to match beside the network's output.

A loss on the output alone tells the first layers little about what their rounding does. Matching the teacher
block by block tells them (FitNets, arXiv:1412.6550; BRECQ, arXiv:2102.05426, finds blocks to be the right grain
for low bits: layers inside one may err together). It costs no forward: both networks run anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hq_plugin.batch import Batch
from hq_plugin.distillation import tensors_of

#: Modules that hold blocks and are none.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_blocks(model: nn.Module, sites: Sequence[str]) -> list[str]:
    """Returns the names of a model's blocks, in order.

    Blocks are the repeated parts of a network: what is in a Sequential, a ModuleList or a ModuleDict, is no such
    container itself, and holds sites. A stage that runs blocks of its own in a Sequential gives these; what it
    holds in lists may run for some samples only, as the experts of a mixture. Sites of their own (the stem, the
    head) are none; where there is nothing else, as in a plain Sequential of layers, the sites are the blocks.

    Args:
        model: The float model.
        sites: Names of its quantizable layers.
    """
    holders = {".".join(name.split(".")[:depth]) for name in sites for depth in range(1, name.count(".") + 1)}

    def inside(module: nn.Module, path: str, kinds: tuple[type[nn.Module], ...]) -> list[str]:
        found = []
        for name, child in module.named_children():
            at = f"{path}.{name}" if path else name
            if at not in holders:
                continue
            if isinstance(module, kinds) and not isinstance(child, _CONTAINERS):
                found += inside(child, at, (nn.Sequential,)) or [at]
            else:
                found += inside(child, at, kinds)
        return found

    return inside(model, "", _CONTAINERS) or list(sites)


class BlockOutputs:
    """Collects what blocks give while a network and its teacher run.

    Attributes:
        names: The blocks.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._seen: dict[str, list[Tensor]] = {}
        self._expected: dict[str, list[Tensor]] = {}
        self._variances: dict[str, Tensor] = {}
        self._resting = False

    @contextmanager
    def watching(self, network: nn.Module, teacher: nn.Module, example: Batch) -> Iterator[BlockOutputs]:
        """Watches the blocks of both networks, which have them under the same names.

        Args:
            network: The student.
            teacher: The float model.
            example: On it the variance of the teacher's outputs is measured, once: processes that see different
                samples of a batch then divide by the same.
        """
        hooks = []
        for model, kept in ((network, self._seen), (teacher, self._expected)):
            for name in self.names:
                hooks.append(model.get_submodule(name).register_forward_hook(self._keeper(kept, name)))
        try:
            if self.names:
                with torch.no_grad():
                    example.run(teacher)
                for name in self.names:
                    if outputs := self._of(self._expected, name, example):
                        flat = torch.cat([x.flatten().float() for x in outputs])
                        self._variances[name] = flat.var(correction=0).clamp_min(1e-12)
                self.forget()
            yield self
        finally:
            for hook in hooks:
                hook.remove()
            self.forget()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Inside, nothing is collected from what runs."""
        self._resting = True
        try:
            yield
        finally:
            self._resting = False

    def distance(self, batch: Batch) -> Tensor:
        """Returns the relative squared error of the outputs since the last call, the mean over blocks.

        Args:
            batch: What both networks ran on: of padded sequences, the tokens that count are compared.
        """
        errors = []
        for name in self.names:
            seen, expected = self._of(self._seen, name, batch), self._of(self._expected, name, batch)
            # Where a router sends other tokens, there is nothing to compare.
            if name in self._variances and [x.shape for x in seen] == [x.shape for x in expected]:
                for student, teacher in zip(seen, expected, strict=True):
                    if student.numel() == 0:
                        continue  # no row of a table's part was asked for
                    errors.append((student.float() - teacher.float()).square().mean() / self._variances[name])
        self.forget()
        return torch.stack(errors).mean() if errors else torch.zeros(())

    @staticmethod
    def _of(kept: dict[str, list[Tensor]], name: str, batch: Batch) -> list[Tensor]:
        return tensors_of(batch.without_padding(kept.get(name, []), name))

    def forget(self) -> None:
        """Lets go of the outputs."""
        self._seen.clear()
        self._expected.clear()

    def _keeper(self, kept: dict[str, list[Tensor]], name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            # What else a block returns (attention weights, caches, losses of routers), the next one does not read.
            if not self._resting:
                kept.setdefault(name, []).extend(tensors_of(output)[:1])

        return keep
