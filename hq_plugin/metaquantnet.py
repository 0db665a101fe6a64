"""`MetaQuantNet`: generates the weights and quantization steps of a network for any bit width.

Section 3.2 of arXiv:2004.11506. There is one block for each weight (tied weights share one) and one
table of steps for each quantized input. A block sees the width of its own layer only, so what it
generates can be cached for each width once training has ended. It takes the layer's float weight, which
stays a parameter of the layer, and gives the float weight for a width plus the step with which the
quantization function (`quantization.py`) then quantizes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from hq_plugin.config import Config
from hq_plugin.errors import PolicyError
from hq_plugin.policy import FLOAT_BITS, HybridPolicy
from hq_plugin.quantization import (
    activation_range,
    fake_quantize_activation,
    fake_quantize_weight,
    optimal_weight_step,
    stored_step,
)
from hq_plugin.sites import Site
from hq_plugin.space import SearchSpace

Kind = Literal["dense", "low_rank", "table"]


class WeightBlock(nn.Module):
    """Base of the blocks, and the `table` block: the layer's own weight, with a learned step a width.

    The ablation that the other two must beat: widths share one weight, as in plain quantization-aware
    training, and no network generates anything.

    Args:
        weight: The float weight, `[channels, ...]`; steps start where its squared error is least.
        widths: The widths that can be asked for.

    Attributes:
        log_step: `[widths, channels]`, learned; steps are learned as logarithms so that they stay
            positive and one learning rate fits layers of any scale.
    """

    def __init__(self, weight: Tensor, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = widths
        steps = torch.stack([optimal_weight_step(weight, bits) for bits in widths])
        self.log_step = nn.Parameter(steps.log())

    def index(self, bits: int) -> int:
        """Returns the row of a width; raises PolicyError for one that the block was not built for."""
        if bits not in self.widths:
            raise PolicyError(f"This MetaQuantNet was built for widths {self.widths}, not for {bits}.")
        return self.widths.index(bits)

    def step(self, bits: int) -> Tensor:
        """Returns the step of every channel, float32 `[channels]`, in the precision that is stored."""
        return stored_step(self.log_step[self.index(bits)].exp())

    def weight(self, weight: Tensor, bits: int) -> Tensor:
        """Returns the float weight that is to be quantized to `bits`, in the shape of `weight`."""
        return weight

    def forward(self, weight: Tensor, bits: int) -> Tensor:
        """Generates the quantized (fake-quantized) weight for a width."""
        generated = self.weight(weight, bits)
        return fake_quantize_weight(generated.float(), self.step(bits), bits).to(weight.dtype)


def _rounding(bits: int) -> float:
    """Returns the size of rounding errors, relative to that at 2 bits: they halve with each bit.

    What is generated for a width is scaled by it. Without, widths that are seldom sampled drift with what
    the others learn, and 8 bits can end up further from the float model than 3.
    """
    return 2.0 ** -max(bits - 2, 0)


class _NetworkBlock(WeightBlock):
    """A block with a hidden layer over the one-hot width; what it generates is scaled to the weight."""

    def __init__(self, weight: Tensor, widths: tuple[int, ...], hidden: int) -> None:
        super().__init__(weight, widths)
        self.inner = nn.Linear(len(widths), hidden)
        self.register_buffer("scale", weight.detach().float().std(correction=0).clamp_min(1e-8))
        self.scale: Tensor

    def _reach(self, bits: int) -> Tensor:
        """Returns the scale of what may be added to the weight: that of a width's rounding errors."""
        return self.scale * _rounding(bits)

    def _hidden(self, bits: int) -> Tensor:
        one_hot = torch.zeros(len(self.widths), device=self.log_step.device)
        one_hot[self.index(bits)] = 1.0
        return torch.relu(self.inner(one_hot))


class DenseBlock(_NetworkBlock):
    """The paper's block: `Linear -> ReLU -> Linear`, whose output is the whole weight.

    The last bias is the layer's float weight, so that before training every width generates the
    pretrained weight. The last layer has `hidden * numel` parameters: for small sites.
    """

    def __init__(self, weight: Tensor, widths: tuple[int, ...], hidden: int) -> None:
        super().__init__(weight, widths, hidden)
        self.outer = nn.Linear(hidden, weight.numel(), bias=False)
        nn.init.zeros_(self.outer.weight)

    def weight(self, weight: Tensor, bits: int) -> Tensor:
        """Returns the pretrained weight plus the network's output for this width."""
        return weight + self._reach(bits) * self.outer(self._hidden(bits)).view_as(weight)


class LowRankBlock(_NetworkBlock):
    """The pretrained weight times a generated gain a channel, plus a generated mix of rank-one terms."""

    def __init__(self, weight: Tensor, widths: tuple[int, ...], hidden: int, rank: int) -> None:
        super().__init__(weight, widths, hidden)
        channels, fan_in = weight.shape[0], weight[0].numel()
        rank = min(rank, channels, fan_in)
        self.gain = nn.Linear(hidden, channels, bias=False)
        self.mix = nn.Linear(hidden, rank)
        self.left = nn.Parameter(torch.randn(channels, rank) / rank**0.5)
        self.right = nn.Parameter(torch.zeros(rank, fan_in))
        nn.init.zeros_(self.gain.weight)

    def weight(self, weight: Tensor, bits: int) -> Tensor:
        """Returns the adapted weight for this width."""
        hidden = self._hidden(bits)
        gain = 1 + _rounding(bits) * self.gain(hidden).view(-1, *(1,) * (weight.dim() - 1))
        terms = (self.left * self.mix(hidden)) @ self.right
        return weight * gain + self._reach(bits) * terms.view_as(weight)


def build_block(kind: Kind, weight: Tensor, widths: tuple[int, ...], config: Config) -> WeightBlock:
    """Builds a block of a kind for one weight."""
    weight = weight.detach()
    if kind == "dense":
        return DenseBlock(weight, widths, config.hidden).to(weight.device)
    if kind == "low_rank":
        return LowRankBlock(weight, widths, config.hidden, config.rank).to(weight.device)
    return WeightBlock(weight, widths).to(weight.device)


class ActivationSteps(nn.Module):
    """A learned step and zero point for each width of one layer's input, one a tensor.

    Args:
        widths: The widths that can be asked for; 16 (floating point) needs no entry.

    Attributes:
        log_step: `[widths]`, learned.
        zero_point: `[widths]`, learned as a float and rounded to an integer where it is used.
        calibrated: Whether `initialise` has run.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = tuple(bits for bits in widths if bits != FLOAT_BITS)
        self.log_step = nn.Parameter(torch.zeros(len(self.widths)))
        self.zero_point = nn.Parameter(torch.zeros(len(self.widths)))
        self.register_buffer("calibrated", torch.tensor(False))
        self.calibrated: Tensor

    @torch.no_grad()
    def initialise(self, qparams: Mapping[int, tuple[float, float]]) -> None:
        """Sets step and zero point of every width from what an observer found."""
        for row, bits in enumerate(self.widths):
            step, zero = qparams[bits]
            self.log_step[row] = torch.tensor(step).log()
            self.zero_point[row] = zero
        self.calibrated.fill_(True)

    def qparams(self, bits: int) -> tuple[Tensor, Tensor]:
        """Returns step (float32 scalar) and zero point (float scalar inside the integer range)."""
        row = self.widths.index(bits)
        return self.log_step[row].exp(), self.zero_point[row].clamp(*activation_range(bits))

    def forward(self, x: Tensor, bits: int) -> Tensor:
        """Fake-quantizes an input."""
        step, zero_point = self.qparams(bits)
        return fake_quantize_activation(x, step, zero_point, bits)


class MetaQuantNet(nn.Module):
    """The network of Wang et al. that generates a quantized network for any hybrid vector.

    Args:
        space: The search space, whose widths can be asked for.
        weights: The float weight of every site, by site name.
        config: Gives the kind of the blocks and their sizes.
    """

    def __init__(self, space: SearchSpace, weights: Mapping[str, Tensor], config: Config) -> None:
        super().__init__()
        self.owners = {site.name: site.owner for site in space.table}
        self.blocks = nn.ModuleDict()
        self.activations = nn.ModuleDict()
        for group in space.groups:
            for site in group.sites:
                if site.owner == site.name:
                    kind = _kind(config, site)
                    block = build_block(kind, weights[site.name], group.weight_bits, config)
                    self.blocks[_key(site.name)] = block
                if site.quantizes_input and group.activation_bits != (FLOAT_BITS,):
                    steps = ActivationSteps(group.activation_bits).to(weights[site.name].device)
                    self.activations[_key(site.name)] = steps

    def block(self, site: str) -> WeightBlock:
        """Returns the block that generates a site's weight."""
        block = self.blocks[_key(self.owners[site])]
        assert isinstance(block, WeightBlock)
        return block

    def activation_steps(self, site: str) -> ActivationSteps | None:
        """Returns the steps of a site's input, or None where it always stays float."""
        key = _key(site)
        if key not in self.activations:
            return None
        steps = self.activations[key]
        assert isinstance(steps, ActivationSteps)
        return steps

    def forward(self, policy: HybridPolicy, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Generates the quantized weights of a policy, by site name."""
        return {name: self.block(name)(weights[name], bits.weight) for name, bits in policy.items()}


def _kind(config: Config, site: Site) -> Kind:
    if config.block != "auto":
        return config.block
    return "dense" if site.numel <= config.dense_limit else "low_rank"


def _key(site: str) -> str:
    """A ModuleDict's key may hold no dot, and must not be empty (the model itself may be the site)."""
    return "site:" + site.replace(".", "/")
