"""What rounding the inputs of each layer costs to second order, at each width, from one backward pass a batch.

Measured one at a time, the loss of a narrow input drowns in the noise of the few samples that are scored: of a
MobileNetV3, inputs of 2 bits seemed to cost nothing in two layers, and a sixteenth of what they do in another. The
square of the loss's gradient at an input, times that of its rounding error, is known from the same samples without
that noise (`moments.py` does the same for weights).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hq_plugin.batch import Batch
from hq_plugin.distillation import LossFunction
from hq_plugin.modes import differentiable
from hq_plugin.moments import probes
from hq_plugin.space import SearchSpace


def input_losses(
    network: nn.Module,
    teacher: nn.Module,
    space: SearchSpace,
    batches: Iterable[Batch],
    seed: int,
    loss: LossFunction | None = None,
) -> NDArray[np.float64]:
    """Estimates what each width of each group's inputs costs alone, in the unit of the network's loss.

    The diagonal of the Fisher information at the input, whose gradients are those of `moments.collect_moments`:
    half the mean, over samples, of the sum of squared gradients times squared errors.

    Args:
        network: A prepared network with calibrated inputs, which gives the rounding; it is not run.
        teacher: The float model, in eval mode; it is not changed.
        space: The search space.
        batches: A few batches, on the model's device.
        seed: Seeds what is drawn.
        loss: The distance; None is what suits the output.

    Returns:
        `[groups, activation widths]`, relative to each group's widest; infinite where a group lacks the width.
    """
    losses = np.full((len(space.groups), int(space.top[:, 1].max()) + 1), np.inf)
    handles = []
    for row, group in enumerate(space.groups):
        losses[row, : len(group.activation_bits)] = 0.0
        if len(group.activation_bits) == 1:
            continue
        for site in group.sites:
            quantizer: Any = network.get_submodule(site.name).activation_fake_quant
            watch = _Watch(quantizer, group.activation_bits, losses[row], group.is_dynamic(site))
            layer = teacher.get_submodule(site.name)
            handles.append(layer.register_forward_pre_hook(watch.enter, with_kwargs=True))
    positions = 0
    try:
        with torch.enable_grad(), differentiable(teacher):
            for probe, seen in probes(teacher, batches if handles else (), seed, loss):
                positions += seen
                if probe.requires_grad:
                    probe.backward()
    finally:
        for handle in handles:
            handle.remove()
    losses /= max(positions, 1)
    for row, group in enumerate(space.groups):
        losses[row] -= losses[row, len(group.activation_bits) - 1]
    return losses


class _Watch:
    """Adds up, at one layer, squared gradients at its input times squared errors of each width.

    Args:
        quantizer: Rounds the input at the width that is set.
        widths: The widths.
        sums: `[widths or more]`, to which is added.
        dynamic: Whether each row has a step of its own.
    """

    def __init__(self, quantizer: Any, widths: tuple[int, ...], sums: NDArray[np.float64], dynamic: bool) -> None:
        self.quantizer, self.widths, self.sums, self.dynamic = quantizer, widths, sums, dynamic

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gives the layer a copy of its input, which nothing else uses or changes, and watches its gradient."""
        name = None if args else next(iter(kwargs))
        x = args[0] if name is None else kwargs[name]
        # Parameters need no gradient, so the graph starts at the first layer that is watched.
        own = x.clone() if x.requires_grad else x.detach().clone().requires_grad_(True)
        # The hook must not hold the tensor that holds it: nothing would find that circle.
        seen = own.detach()
        own.register_hook(lambda gradient: self.see(seen, gradient))
        return ((own, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: own})

    @torch.no_grad()
    def see(self, x: Tensor, gradient: Tensor) -> None:
        """Adds what one call of the layer tells."""
        squared = gradient.float().square()
        before = self.quantizer.bits, self.quantizer.is_dynamic
        self.quantizer.is_dynamic = self.dynamic
        for index, bits in enumerate(self.widths):
            self.quantizer.bits = bits
            error = (self.quantizer(x) - x).float()
            self.sums[index] += 0.5 * float((squared * error.square()).sum())
        self.quantizer.bits, self.quantizer.is_dynamic = before
