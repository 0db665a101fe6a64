"""The blocks of a MetaQuantNet: each generates the weight and the steps of one layer for any bit width.

Section 3.2 of arXiv:2004.11506. A block sees the width of its own layer only, so what it generates can be cached
for each width once training has ended. It takes the layer's float weight, which stays a parameter of the layer, and
gives the float weight for a width plus the step with which the quantization function (`quantization.py`) then
quantizes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hq_plugin.config import Config
from hq_plugin.errors import PolicyError
from hq_plugin.optimal_qparams import optimal_group_qparams
from hq_plugin.quantization import (
    fake_quantize_weight,
    quantize_weight,
    weight_rows,
)
from hq_plugin.stored_qparams import stored_step, stored_zero

Kind = Literal["dense", "low_rank", "table"]

#: Weights of this many elements or more are generated again in the backward pass, and not kept.
_REGENERATED = 1 << 17


class WeightBlock(nn.Module):
    """Base of the blocks, and the `table` block: the layer's own weight, with a learned step a width.

    The ablation that the other two must beat: widths share one weight, as in plain quantization-aware
    training, and no network generates anything.

    Args:
        weight: The float weight, `[channels, ...]`; steps start where its squared error is least.
        widths: The widths that can be asked for.
        group_sizes: Inputs that share a step and a zero point, for each width or one for all; 0 for one step a
            channel and no zero point.
        importance: `[inputs]`, the weight of each input's squared error (its second moment, say).
        whole: Whether zero points are whole numbers.

    Attributes:
        log_step: The rows of every width after one another, learned; steps are learned as logarithms so that they
            stay positive and one learning rate fits layers of any scale.
        zero: The same for the widths that have groups, learned, in units of the step; None if none has.
    """

    def __init__(
        self,
        weight: Tensor,
        widths: tuple[int, ...],
        group_sizes: int | Sequence[int] = 0,
        importance: Tensor | None = None,
        whole: bool = False,
    ) -> None:
        super().__init__()
        sizes = (group_sizes,) * len(widths) if isinstance(group_sizes, int) else tuple(group_sizes)
        self.widths, self.whole = widths, whole
        self._layout(sizes, weight.shape)
        steps, zeros = [], []
        for bits, size in zip(widths, sizes, strict=True):
            step, zero = optimal_group_qparams(weight, bits, size, importance, whole)
            steps.append(step)
            zeros += [] if zero is None else [zero]
        self.log_step = nn.Parameter(torch.cat(steps).log())
        self.zero: nn.Parameter | None = nn.Parameter(torch.cat(zeros)) if zeros else None

    def _layout(self, group_sizes: tuple[int, ...], shape: Sequence[int]) -> None:
        """Lays out where the rows of each width begin, in `log_step` and in `zero`."""
        self.group_sizes = group_sizes
        self._steps, self._zeros, step, zero = [], [], 0, 0
        for size in group_sizes:
            rows = math.prod(shape) // size if size else shape[0]
            self._steps.append(slice(step, step + rows))
            self._zeros.append(slice(zero, zero + rows) if size else None)
            step, zero = step + rows, zero + (rows if size else 0)

    def group_size(self, bits: int) -> int:
        """Returns how many inputs share a step and a zero point at a width; 0 for whole channels."""
        return self.group_sizes[self.index(bits)]

    def index(self, bits: int) -> int:
        """Returns the row of a width; raises PolicyError for one that the block was not built for."""
        if bits not in self.widths:
            raise PolicyError(f"This MetaQuantNet was built for widths {self.widths}, not for {bits}.")
        return self.widths.index(bits)

    def step(self, bits: int) -> Tensor:
        """Returns the step of every row, float32 `[rows]`, in the precision that is stored."""
        return stored_step(self.log_step[self._steps[self.index(bits)]].exp())

    def zero_point(self, bits: int) -> Tensor | None:
        """Returns the zero point of every row, in the precision that is stored, or None for whole channels."""
        rows = self._zeros[self.index(bits)]
        return None if self.zero is None or rows is None else stored_zero(self.zero[rows], bits, self.whole)

    def weight(self, weight: Tensor, bits: int, channels: Tensor | None = None) -> Tensor:
        """Returns the float weight that is to be quantized to `bits`, in the shape of `weight`.

        Args:
            weight: The layer's own weight.
            bits: A width of the block.
            channels: Indices of the channels that are wanted; None for all.
        """
        return weight if channels is None else weight[channels]

    def forward(self, weight: Tensor, bits: int) -> Tensor:
        """Generates the quantized (fake-quantized) weight for a width.

        For the backward pass a large weight is generated again, layer by layer: what is kept until then would
        be several times the network.
        """
        if weight.numel() < _REGENERATED or not torch.is_grad_enabled():
            return self._generate(weight, bits)
        generated: Tensor = checkpoint(self._generate, weight, bits, use_reentrant=False, preserve_rng_state=False)
        return generated

    def _generate(self, weight: Tensor, bits: int) -> Tensor:
        rows = weight_rows(self.weight(weight, bits).float(), self.group_size(bits))
        quantized = fake_quantize_weight(rows, self.step(bits), bits, self.zero_point(bits))
        return quantized.view_as(weight).to(weight.dtype)

    def channels(self, weight: Tensor, bits: int, channels: Tensor) -> Tensor:
        """Generates some channels of the quantized weight: those of `forward`, without the work for the others.

        Args:
            weight: The layer's own weight.
            bits: A width of the block.
            channels: Indices, `[wanted]`.

        Returns:
            `[wanted, ...]`.
        """
        count, zero = weight.shape[0], self.zero_point(bits)
        step = self.step(bits).view(count, -1)[channels].flatten()
        zero = None if zero is None else zero.view(count, -1)[channels].flatten()
        wanted = self.weight(weight, bits, channels)
        rows = weight_rows(wanted.float(), self.group_size(bits))
        return fake_quantize_weight(rows, step, bits, zero).view_as(wanted).to(weight.dtype)

    @torch.no_grad()
    def fixed(self, bits: int) -> WeightBlock:
        """Returns a table of one width with the steps and zero points that this block has for it."""
        steps, zeros = self._steps[self.index(bits)], self._zeros[self.index(bits)]
        table = WeightBlock.__new__(WeightBlock)
        nn.Module.__init__(table)
        table.widths, table.whole, table.group_sizes = (bits,), self.whole, (self.group_size(bits),)
        table.log_step = nn.Parameter(self.log_step[steps].clone())
        table._steps = [slice(0, len(table.log_step))]
        table.zero = None if self.zero is None or zeros is None else nn.Parameter(self.zero[zeros].clone())
        table._zeros = [None if table.zero is None else slice(0, len(table.zero))]
        return table

    @torch.no_grad()
    def integers(self, weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns what `forward` stands for: int8 integers in the shape of `weight`, steps, zero points."""
        rows = weight_rows(self.weight(weight, bits).float(), self.group_size(bits))
        step, zero = self.step(bits), self.zero_point(bits)
        return quantize_weight(rows, step, bits, zero).view(weight.shape), step, zero


def _rounding(bits: int) -> float:
    """Returns the size of rounding errors, relative to that at 2 bits: they halve with each bit.

    What is generated for a width is scaled by it. Without, widths that are seldom sampled drift with what
    the others learn, and 8 bits can end up further from the float model than 3.
    """
    return 2.0 ** -max(bits - 2, 0)


class _NetworkBlock(WeightBlock):
    """A block with a hidden layer over the one-hot width; what it generates is scaled to the weight."""

    def __init__(
        self,
        weight: Tensor,
        widths: tuple[int, ...],
        group_sizes: int | Sequence[int] = 0,
        importance: Tensor | None = None,
        whole: bool = False,
        *,
        hidden: int,
    ) -> None:
        super().__init__(weight, widths, group_sizes, importance, whole)
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

    def __init__(
        self,
        weight: Tensor,
        widths: tuple[int, ...],
        group_sizes: int | Sequence[int] = 0,
        importance: Tensor | None = None,
        whole: bool = False,
        *,
        hidden: int,
    ) -> None:
        super().__init__(weight, widths, group_sizes, importance, whole, hidden=hidden)
        self.outer = nn.Linear(hidden, weight.numel(), bias=False)
        nn.init.zeros_(self.outer.weight)

    def weight(self, weight: Tensor, bits: int, channels: Tensor | None = None) -> Tensor:
        """Returns the pretrained weight plus the network's output for this width."""
        adapted = weight + self._reach(bits) * self.outer(self._hidden(bits)).view_as(weight)
        return adapted if channels is None else adapted[channels]


class LowRankBlock(_NetworkBlock):
    """The pretrained weight times a generated gain a channel, plus a generated mix of rank-one terms."""

    def __init__(
        self,
        weight: Tensor,
        widths: tuple[int, ...],
        group_sizes: int | Sequence[int] = 0,
        importance: Tensor | None = None,
        whole: bool = False,
        *,
        hidden: int,
        rank: int,
    ) -> None:
        super().__init__(weight, widths, group_sizes, importance, whole, hidden=hidden)
        channels, fan_in = weight.shape[0], weight[0].numel()
        rank = min(rank, channels, fan_in)
        self.gain = nn.Linear(hidden, channels, bias=False)
        self.mix = nn.Linear(hidden, rank)
        self.left = nn.Parameter(torch.randn(channels, rank) / rank**0.5)
        self.right = nn.Parameter(torch.zeros(rank, fan_in))
        nn.init.zeros_(self.gain.weight)

    def weight(self, weight: Tensor, bits: int, channels: Tensor | None = None) -> Tensor:
        """Returns the adapted weight for this width."""
        hidden = self._hidden(bits)
        left: Tensor = self.left
        gain = 1 + _rounding(bits) * self.gain(hidden).view(-1, *(1,) * (weight.dim() - 1))
        if channels is not None:
            weight, gain, left = weight[channels], gain[channels], left[channels]
        terms = (left * self.mix(hidden)) @ self.right
        return weight * gain + self._reach(bits) * terms.view_as(weight)


def build_block(
    kind: Kind,
    weight: Tensor,
    widths: tuple[int, ...],
    config: Config,
    group_sizes: int | Sequence[int] = 0,
    importance: Tensor | None = None,
) -> WeightBlock:
    """Builds a block of a kind for one weight."""
    weight, whole = weight.detach(), config.whole_zero_points
    block: WeightBlock
    if kind == "dense":
        block = DenseBlock(weight, widths, group_sizes, importance, whole, hidden=config.hidden)
    elif kind == "low_rank":
        block = LowRankBlock(weight, widths, group_sizes, importance, whole, hidden=config.hidden, rank=config.rank)
    else:
        block = WeightBlock(weight, widths, group_sizes, importance, whole)
    return block.to(weight.device)
