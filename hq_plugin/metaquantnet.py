"""`MetaQuantNet`: generates the weights and quantization steps of a network for any bit width.

Section 3.2 of arXiv:2004.11506. There is one block (`weight_blocks.py`) for each weight (tied weights share
one) and one table of steps for each quantized input.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hq_plugin.config import Config
from hq_plugin.policy import FLOAT_BITS, HybridPolicy
from hq_plugin.quantization import (
    activation_range,
    fake_quantize_activation,
)
from hq_plugin.sites import Site
from hq_plugin.space import SearchSpace
from hq_plugin.weight_blocks import Kind, WeightBlock, build_block


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
        self.log_step = nn.Parameter(torch.zeros(len(self.widths), dtype=torch.float32))
        self.zero_point = nn.Parameter(torch.zeros(len(self.widths), dtype=torch.float32))
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
        importance: Second moments of the inputs of sites, `[inputs]` by site name, where they are known.
    """

    def __init__(
        self,
        space: SearchSpace,
        weights: Mapping[str, Tensor],
        config: Config,
        importance: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        importance = importance or {}
        self.owners = {site.name: site.owner for site in space.table}
        self.blocks = nn.ModuleDict()
        self.activations = nn.ModuleDict()
        for group in space.groups:
            for site in group.sites:
                if site.owner == site.name:
                    kind = _kind(config, site)
                    block = build_block(
                        kind,
                        weights[site.name],
                        group.weight_bits,
                        config,
                        [group.group_size(site, width) for width in range(len(group.weight_bits))],
                        importance.get(site.name),
                    )
                    self.blocks[_key(site.name)] = block
                if site.quantizes_input and group.activation_bits != (FLOAT_BITS,) and not group.is_dynamic(site):
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
        """Generates the quantized weights of a policy, by site name; group sizes are the blocks' own."""
        return {name: self.block(name)(weights[name], bits.weight) for name, bits in policy.items()}


def _kind(config: Config, site: Site) -> Kind:
    if config.block != "auto":
        return config.block
    return "dense" if site.numel <= config.dense_limit else "low_rank"


def _key(site: str) -> str:
    """A ModuleDict's key may hold no dot, and must not be empty (the model itself may be the site)."""
    return "site:" + site.replace(".", "/")
