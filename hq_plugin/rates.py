"""Learning rates of the training loop (`training.py`): their peaks, by what a parameter is, and their course.

Rates that the user gives are taken as they are; the rest follow from the network. Which figures stand behind the
constants is in docs/experiments.md, under "Blocks and rates" and "What lasts after training".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hq_plugin.nn.split import split_embeddings
from hq_plugin.qat_layers import qat_layers

#: Share of the steps over which rates rise.
WARMUP = 0.05
#: Without a learning rate, the peak of a weight of `NARROW` bits is this share of its root mean square, and half
#: of that for each bit more: an update then moves it by the same share of a quantization step in every layer and
#: network. By the mean of all widths, wide layers of a MobileNetV3 were moved further than they had been rounded
#: (docs/experiments.md).
RELATIVE_RATE, NARROW = 0.01, 2
#: Fine-tuning that a tenth of its steps led far away begins again at such shares of these rates: no one rate is for
#: all networks, and what is led away too far the rest of the steps does not make up for (docs/experiments.md).
BACK_OFF = (0.3, 0.1)
#: Steps of fine-tuning for which these were found. Fewer are to go further each: rates of weights rise with the
#: root of how many times fewer they are, to no more than so many times. A vision transformer ended 22 % closer
#: after 100 steps, a MobileNetV3 as close (docs/experiments.md).
STEPS, MOST = 300, 2.0
#: Input channels up to which `RELATIVE_RATE` holds. Adam moves the weights of a channel together: what they add up
#: to at its output grows with their number, where what they began as adds up to its root. So a wider layer's share
#: falls with the root (as Adam's rate itself falls with the number in Yang et al., arXiv:2203.03466, table 3). An
#: EfficientNet-Lite0 came 7 to 23 % closer with it; narrow networks stay as they are.
CHANNELS = 64
#: Rates of weights are this many times as high once fine-tuning has BatchNorm normalise by batches' statistics:
#: kept ones fit the weights that they are of and hold these back, batches' move along.
FOLLOWED = 2.0
#: Share of all that for the columns of embeddings. A row moves with the few samples that look it up, and goes on by
#: Adam's mean when it is not: as far as a step of the first columns' wide integers. At the whole rate MiniLM moved
#: away from where rounding had put it (docs/experiments.md).
COLUMNS = 0.1
#: The peak of what generates weights, and of quantization steps and zero points; and bounds for vectors: biases may
#: begin at 0, and scales lie about 1.
GENERATOR_RATE, STEP_RATE, FLOAT_RATES = 5e-4, 2e-3, (1e-4, 1e-3)
#: All of these are for steps of so many samples. Fewer give noisier gradients, and Adam's rates are to fall with
#: the root (Malladi et al., arXiv:2205.10287). With 16 samples, a MobileNetV2 with ImageNet's weights moved away at
#: 1 % and came closer at 0.35 %.
SAMPLES = 128
_STEP_PARAMETERS = (".log_step", ".zero", ".zero_point")
_GENERATOR = "weight_fake_quant.block."
#: Layers whose outputs are sums over input channels; rows of an embedding are not.
_SUMMING = (nn.Linear, nn.Conv1d, nn.Conv2d)


def share_of_steps(steps: int) -> float:
    """Returns how many times as high rates of weights are in a fine-tuning of so many steps."""
    return min(MOST, max(1.0, math.sqrt(STEPS / max(steps, 1))))


@dataclass
class Rates:
    """What decides the learning rates of a stage.

    Attributes:
        weights: Peak rate of weights; None gives each its own (see `RELATIVE_RATE`).
        steps: Peak rate of quantization steps and zero points; None takes `STEP_RATE`.
        share: Rates of weights that nobody gave are this share of what they would be; those of vectors stay.
        base: Rate of the network's own weights, as a share of that of what generates them.
        final: Rates at the end, as a share of their peaks.
    """

    weights: float | None
    steps: float | None
    share: float = 1.0
    base: float = 1.0
    final: float = 0.0

    def groups(
        self, network: nn.Module, running: nn.Module, samples: int, rises: bool = False
    ) -> list[dict[str, Any]]:
        """Returns the parameters of what runs in place of a network, in groups for an optimizer, with their peaks.

        Args:
            network: The network, whose parameters are whole.
            running: What runs in its place, whose parameters may be pieces of them.
            samples: Samples of a step.
            rises: Whether rates of weights that nobody gave rise where BatchNorm comes to follow batches.
        """
        scale = _scale(samples)
        pieces = dict(running.named_parameters())
        named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        steps = [pieces[name] for name, _ in named if name.endswith(_STEP_PARAMETERS)]
        rest = [(name, p) for name, p in named if not name.endswith(_STEP_PARAMETERS)]
        generators = [pieces[name] for name, _ in rest if _GENERATOR in name]
        own = [(pieces[name], p) for name, p in rest if _GENERATOR not in name]
        groups: list[dict[str, Any]] = [
            {"params": generators, "lr": GENERATOR_RATE * scale if self.weights is None else self.weights},
            {"params": steps, "lr": STEP_RATE * scale if self.steps is None else self.steps},
        ]
        channels, columns, widths = _input_channels(network), _column_weights(network), _widths(network)
        alike: dict[tuple[float, bool], list[nn.Parameter]] = {}  # an optimizer steps group by group
        for piece, whole in own:
            if self.weights is None:
                rate = scale * _relative_rate(whole, widths.get(id(whole), NARROW), channels.get(id(whole), 1))
                rate *= self.share if whole.dim() >= 2 else 1.0
            else:
                rate = self.weights
            rate *= self.base * (COLUMNS if id(whole) in columns else 1.0)
            alike.setdefault((rate, rises and self.weights is None and whole.dim() >= 2), []).append(piece)
        groups += [{"params": same, "lr": rate, "rises": rise} for (rate, rise), same in alike.items()]
        return [group for group in groups if group["params"]]

    def told(self, samples: int) -> str:
        """Returns the peak rate of weights in words, for steps of so many samples."""
        if self.weights is not None:
            return f"{self.weights:g}"
        return f"{RELATIVE_RATE * self.share * _scale(samples):.2g} of each weight's size"

    def schedule(
        self, optimizer: torch.optim.Optimizer, steps: int, followed: Callable[[], bool]
    ) -> torch.optim.lr_scheduler.LambdaLR:
        """Returns the course of the rates of an optimizer that has `groups`: they rise, and fall as a cosine does.

        Args:
            optimizer: The optimizer.
            steps: Steps of the stage.
            followed: Whether BatchNorm has come to follow batches.
        """

        def share_of_peak(step: int, rises: bool) -> float:
            return (FOLLOWED if rises and followed() else 1.0) * cosine(step, steps, self.final)

        shares: list[Callable[[int], float]] = [
            functools.partial(share_of_peak, rises=group.get("rises", False)) for group in optimizer.param_groups
        ]
        return torch.optim.lr_scheduler.LambdaLR(optimizer, shares)


def cosine(step: int, steps: int, final: float) -> float:
    """Returns the share of its peak that a rate has at a step."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _scale(samples: int) -> float:
    return math.sqrt(min(1.0, samples / SAMPLES))


def _input_channels(network: nn.Module) -> dict[int, int]:
    """Returns by the id of each weight how many channels a product with it sums over."""
    layers = [module for module in network.modules() if isinstance(module, _SUMMING)]
    weights = [layer._parameters.get("weight") for layer in layers]  # a parametrized layer has none
    return {id(weight): weight.shape[1] for weight in weights if weight is not None}


def _column_weights(network: nn.Module) -> set[int]:
    """Returns the ids of the weights that are blocks of an embedding's columns."""
    wholes = [whole for whole in split_embeddings(network).values() if whole.basis is not None]
    blocks = [block for whole in wholes for block in whole.parts.modules() if isinstance(block, nn.Embedding)]
    return {id(block._parameters["weight"]) for block in blocks}


def _widths(network: nn.Module) -> dict[int, int]:
    """Returns by the id of each weight the width that it trains for, where it is one."""
    layers: list[Any] = list(qat_layers(network).values())
    fixed = [layer for layer in layers if len(layer.weight_fake_quant.block.widths) == 1]
    return {id(layer._parameters["weight"]): layer.weight_fake_quant.bits for layer in fixed}


def _relative_rate(parameter: Tensor, width: int, channels: int) -> float:
    rate = RELATIVE_RATE * float(parameter.detach().abs().float().square().mean().sqrt())
    if parameter.dim() < 2:
        return min(max(rate, FLOAT_RATES[0]), FLOAT_RATES[1])
    wide = math.sqrt(min(1.0, CHANNELS / max(channels, 1)))
    return rate * wide * 0.5 ** max(width - NARROW, 0)
