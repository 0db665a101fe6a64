"""Second moments of what enters and leaves each linear layer: which weights matter, from a few batches.

The inputs' moments weigh the error of each weight where steps and zero points are chosen (as GPTQ,
arXiv:2210.17323, and AWQ, arXiv:2306.00978, use them). With those of the loss's gradient at the outputs they
give the loss of a rounded weight to second order, without running the network for each width and layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from hq_plugin.batch import Batch, first_input
from hq_plugin.distillation import LossFunction, random_probe, tensors_of
from hq_plugin.errors import ConfigError
from hq_plugin.modes import differentiable
from hq_plugin.precision import autocast
from hq_plugin.sites import Site
from hq_plugin.space import SearchSpace

#: Kinds of sites whose inputs are seen.
KINDS = ("linear", "embedding")
#: Gradients of weights that are taken of each batch, each over a part of it, whose sum, squared, is one draw.
DRAWS = 16


@dataclass(frozen=True)
class SiteMoments:
    """Second moments at one site.

    Attributes:
        inputs: `[inputs]`, mean of the squared input over samples and positions but for padding; of an embedding,
            `[rows]`, how often each row is looked up for each position of the output.
        outputs: `[outputs]`, the squared gradient of a sample's loss at the output, summed over the positions that
            the sample has there, mean over samples; of an embedding, `[width]`, the mean over its look-ups.
        kind: Kind of the site.
    """

    inputs: Tensor
    outputs: Tensor
    kind: str

    def loss(self, error: Tensor) -> float:
        """Returns the loss of a change of the weight to second order, in the unit of the network's loss.

        The Fisher information, which for a divergence from the network's own output is the Hessian, is taken
        as the product of the two moments, without correlations (the diagonal of K-FAC, arXiv:1503.05671).

        Args:
            error: Change of the weight, in its shape.
        """
        squared = error.float().square()
        rows, columns = (self.inputs, self.outputs) if self.kind == "embedding" else (self.outputs, self.inputs)
        return 0.5 * float(rows @ squared @ columns)


@dataclass(frozen=True)
class WeightMoments:
    """Second moments of the gradient of a weight that is read around its layer, so that no input is seen.

    Attributes:
        gradient: The weight's shape. Labels are drawn from the model, so gradients of different samples are
            independent with mean 0, and the square of their sum stands for the sum of their squares.
    """

    gradient: Tensor

    def loss(self, error: Tensor) -> float:
        """Returns the loss of a change of the weight to second order, by the diagonal of the Fisher information.

        Args:
            error: Change of the weight, in its shape.
        """
        return 0.5 * float((self.gradient * error.float().square()).sum())


Moments = SiteMoments | WeightMoments


class _Sums:
    """Running sums at one site."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.inputs: Tensor | float = 0.0
        self.outputs: Tensor | float = 0.0
        self.count = 0
        #: What runs now: the loss has no gradient at its padding.
        self.running: Batch | None = None

    def see_input(self, x: Tensor) -> None:
        if self.running is not None:
            x = self.running.without_padding(x[..., None] if self.site.kind == "embedding" else x, self.site.name)
        if self.site.kind == "embedding":
            self.inputs = self.inputs + torch.bincount(x.flatten(), minlength=self.site.weight_shape[0]).float()
            self.count += x.numel()
        else:
            flat = x.detach().float().reshape(-1, x.shape[-1])
            self.inputs = self.inputs + flat.square().sum(0)
            self.count += len(flat)

    def see_gradient(self, gradient: Tensor) -> None:
        self.outputs = self.outputs + gradient.detach().float().reshape(-1, gradient.shape[-1]).square().sum(0)

    def moments(self, positions: int) -> SiteMoments | None:
        """Returns the moments for a loss that is a mean over `positions`, of which an embedding may see some."""
        if not self.count or not isinstance(self.inputs, Tensor) or not isinstance(self.outputs, Tensor):
            return None
        # Over all positions the products' sum is taken as the product of the sums over their number: that of the
        # layer's positions, of which the loss may have fewer (a class for all patches of a picture).
        inputs, outputs = self.count, positions
        if self.site.kind == "embedding":  # how often a row is looked up, for each position of the loss
            inputs, outputs = outputs, inputs
        return SiteMoments(self.inputs / inputs, self.outputs / outputs, self.site.kind)

    @property
    def fits(self) -> bool:
        """Whether what was seen has the weight's sizes: a subclass may multiply by parts of its weight."""
        seen = [self.outputs, self.inputs]
        wanted = self.site.weight_shape if self.site.kind == "linear" else self.site.weight_shape[::-1]
        return all(not isinstance(v, Tensor) or len(v) == n for v, n in zip(seen, wanted, strict=True))


def collect_moments(
    teacher: nn.Module, sites: Iterable[Site], batches: Iterable[Batch], seed: int, loss: LossFunction | None = None
) -> dict[str, Moments]:
    """Runs the float model forwards and backwards, and returns the moments of its sites by name.

    The gradient is that of the log-likelihood of labels drawn from the model's own distribution, as the
    Fisher information wants it (not that of true labels); where there are no class scores, of a random product.

    Args:
        teacher: The float model, in eval mode; it is not changed.
        sites: The sites.
        batches: A few batches, on the model's device.
        seed: Seeds what is drawn.
        loss: The distance; None is what suits the output.

    Raises:
        ConfigError: No gradient reaches the layers from the model's output.
    """
    sites, batches = list(sites), list(batches)
    sums = {site.name: _Sums(site) for site in sites if site.kind in KINDS and site.called}
    read = {site.name: _read_weight(teacher, site) for site in sites if site.name not in sums}
    if read:
        batches = [part for batch in batches for part in _parts(batch, teacher)]
    squares = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in read.items()}
    positions = 0
    lookups = _Lookups()

    def in_turn() -> Iterator[Batch]:
        for batch in batches:
            for sum_ in sums.values():
                sum_.running = batch
            yield batch

    handles = []
    for name, sum_ in sums.items():
        module = teacher.get_submodule(name)
        if sum_.site.kind == "embedding":
            handles += lookups.watch(module, sum_)
        else:
            handles.append(module.register_forward_hook(_hook(sum_), with_kwargs=True))
    try:
        with torch.enable_grad(), differentiable(teacher), lookups:
            for probe, seen in probes(teacher, in_turn(), seed, loss):
                if not probe.requires_grad:
                    raise ConfigError(
                        'sensitivities="fisher" needs an output that hangs on the layers, and holds a tensor of '
                        'floating point. Take sensitivities="measured".'
                    )
                probe.backward()
                positions += seen
                for name, weight in read.items():
                    if weight.grad is not None:
                        squares[name] += weight.grad.float().square()
                        weight.grad = None
    finally:
        for handle in handles:
            handle.remove()
        for weight in read.values():
            weight.requires_grad_(False)
            weight.grad = None
    found: dict[str, Moments] = {name: WeightMoments(total / positions) for name, total in squares.items()}
    for name, sum_ in sums.items():
        moments = sum_.moments(positions) if sum_.fits else None
        if moments is not None:
            found[name] = moments
    others = [replace(sum_.site, called=False) for sum_ in sums.values() if not sum_.fits]
    return found | (collect_moments(teacher, others, batches, seed, loss) if others else {})


def probes(
    teacher: nn.Module, batches: Iterable[Batch], seed: int, loss: LossFunction | None = None
) -> Iterator[tuple[Tensor, int]]:
    """Runs the float model, and yields what the Fisher information's gradients are of, with its positions.

    Args:
        teacher: The float model, in eval mode.
        batches: Batches, on the model's device.
        seed: Seeds what is drawn.
        loss: The distance; None is what suits the output.
    """
    generator: torch.Generator | None = None
    for batch in batches:
        with autocast():
            output = batch.run(teacher)
        if generator is None:
            tensors = tensors_of(output)
            generator = torch.Generator(tensors[0].device if tensors else "cpu").manual_seed(seed)
        yield random_probe(output, loss, generator)


def _parts(batch: Batch, teacher: nn.Module) -> list[Batch]:
    size = batch.taken_by(teacher, max(1, batch.size // DRAWS)).size
    return [batch.part(start, start + size) for start in range(0, batch.size, size)]


def _read_weight(teacher: nn.Module, site: Site) -> Tensor:
    weight = teacher.get_submodule(site.name)._parameters["weight"]
    assert weight is not None
    return weight.requires_grad_(True)


def _hook(sums: _Sums) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not isinstance(output, Tensor):  # a router, say, that returns what it decided
            return output
        return _see(sums, first_input(args, kwargs), output)

    return hook


def _see(sums: _Sums, x: Tensor, output: Tensor) -> Tensor:
    sums.see_input(x)
    # Parameters need no gradient, so the graph starts at the first site.
    if not output.requires_grad:
        start = output.detach().requires_grad_(True)
        start.register_hook(sums.see_gradient)
        return start.clone()  # which the model may change in place
    # A linear layer returns a view of its product; where a model changes that in place, the view loses its hooks.
    base = output._base
    whole = base is not None and base.numel() == output.numel() and base.shape[-1] == output.shape[-1]
    (base if whole and base is not None else output).register_hook(sums.see_gradient)
    return output


class _Lookups(TorchFunctionMode):
    """Sees which rows embeddings look up where they do it.

    What a subclass is called with need not be rows (OPT's positions are called with a mask), and what it returns
    need not be what it looked up (Gemma scales it).
    """

    def __init__(self) -> None:
        super().__init__()
        self._inside: list[_Sums] = []

    def watch(self, module: nn.Module, sums: _Sums) -> list[RemovableHandle]:
        """Watches an embedding; returns the handles of its hooks."""

        def enter(*_: Any) -> None:
            self._inside.append(sums)

        def leave(*_: Any) -> None:
            self._inside.pop()

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._inside and func is F.embedding:
            return _see(self._inside[-1], args[0], output)
        return output


@torch.no_grad()
def fisher_losses(network: nn.Module, space: SearchSpace, moments: Mapping[str, Moments]) -> NDArray[np.float64]:
    """Estimates what each weight width of each group costs alone.

    Args:
        network: The network that a new MetaQuantNet drives: its weights are the float model's, rounded.
        space: The search space.
        moments: Moments by site name. A site without any costs nothing.

    Returns:
        `[groups, weight widths]`, relative to each group's widest; infinite where a group lacks the width.
    """
    losses = np.full((len(space.groups), int(space.top[:, 0].max()) + 1), np.inf)
    for row, group in enumerate(space.groups):
        for column, bits in enumerate(group.weight_bits):
            losses[row, column] = 0.0
            for site in group.sites:
                if site.name in moments:
                    layer: Any = network.get_submodule(site.name)
                    weight = layer._parameters["weight"]
                    rounded = layer.weight_fake_quant.block(weight, bits)
                    losses[row, column] += moments[site.name].loss(rounded - weight)
        losses[row, : len(group.weight_bits)] -= losses[row, len(group.weight_bits) - 1]
    return losses
