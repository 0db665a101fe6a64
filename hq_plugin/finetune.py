"""Step 3 of the method: with the policy fixed, a network is trained for it.

Section 3.4 of arXiv:2004.11506 retrains the policy that was found, and so does this where there are steps enough;
with few, generated weights are the better start where they are closer to the float model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from hq_plugin import torch_ao
from hq_plugin.checkpoint import Checkpoint
from hq_plugin.config import Config
from hq_plugin.data import Data
from hq_plugin.distillation import Fidelity, LossFunction, training_loss
from hq_plugin.errors import HQWarning
from hq_plugin.metaquantnet import ActivationSteps
from hq_plugin.policy import FLOAT_BITS, HybridPolicy
from hq_plugin.qat_layers import qat_layers
from hq_plugin.rates import BACK_OFF, Rates, share_of_steps
from hq_plugin.scoring import calibrate_activations
from hq_plugin.seeding import seeded
from hq_plugin.tracking import tracking
from hq_plugin.training import Task, train
from hq_plugin.weight_blocks import WeightBlock

#: Share of the steps over which the weight of the blocks falls to 0: over all of them a MobileNetV3 ended at a
#: distance of 0.00127, over half at 0.00112; a ResNet and a vision transformer did not mind (docs/experiments.md).
BLOCKS_UNTIL = 0.5
#: Steps of fine-tuning from which float weights end closer than generated ones, wherever these begin. What meta-
#: training saves is the first 25 steps (docs/experiments.md).
RETRAINED = 100
#: Steps of fine-tuning from which it is worth a warning that they gained nothing.
MANY_STEPS = 20


@dataclass(frozen=True)
class FineTuned:
    """What fine-tuning of a policy ended with.

    Attributes:
        network: The prepared network, which is to be converted.
        fidelity: How close it is to the float model on all held-out samples.
        history: One entry a step, as for `Session.history`.
        seconds: Wall time, that of finding where to start included.
    """

    network: nn.Module
    fidelity: Fidelity
    history: list[dict[str, Any]]
    seconds: float


def possible_starts(config: Config) -> list[Config]:
    """Returns the options of each network that fine-tuning may start from: one origin and one rounding.

    Generated weights were trained as they are rounded, to the nearest. Float ones are closer to the float model,
    and train better, once they are rounded to second order.
    """
    generated = replace(config, finetune_from="generated", rounding=config.rounding or "nearest")
    rounding: Literal["nearest", "second_order"] = "nearest" if config.effort == "smoke" else "second_order"
    retrained = replace(config, finetune_from="float", rounding=config.rounding or rounding)
    origin = config.finetune_from or ("float" if config.steps.finetune >= RETRAINED else "closest")
    return {"float": [retrained], "generated": [generated], "closest": [retrained, generated]}[origin]


@torch.no_grad()
def generated_network(network: nn.Module, policy: HybridPolicy) -> nn.Module:
    """Returns a copy of a meta-trained network for one policy, without its MetaQuantNet.

    The weights that the MetaQuantNet generates for the policy become the layers' own; each layer keeps
    one learned step for its weight and one for its input.
    """
    # Generators are not copied: what they generate is, and they may be larger than the model.
    layers: list[Any] = list(qat_layers(network).values())
    generators = [layer.weight_fake_quant.block for layer in layers]
    fixed = copy.deepcopy(network, {id(block): block for block in generators})
    torch_ao.apply_policy(fixed, policy)
    # One new block for each old one, so that tied weights stay tied (and are generated once).
    blocks: dict[int, WeightBlock] = {}
    for layer in qat_layers(fixed).values():
        quantizer: Any = layer.weight_fake_quant
        old: WeightBlock = quantizer.block
        if id(old) not in blocks:
            weight = layer._parameters["weight"]
            assert weight is not None
            weight.copy_(old.weight(weight, quantizer.bits))
            block = old.fixed(quantizer.bits)
            blocks[id(old)] = block
        quantizer.block = blocks[id(old)]
        activation: Any = layer.activation_fake_quant
        if activation.bits != FLOAT_BITS and not activation.is_dynamic:
            steps = ActivationSteps((activation.bits,)).to(activation.steps.log_step.device)
            if bool(activation.steps.calibrated):
                step_in, zero_point = activation.steps.qparams(activation.bits)
                steps.initialise({activation.bits: (float(step_in), float(zero_point))})
            activation.steps = steps
        else:
            activation.steps = ActivationSteps(())
    return fixed


def float_network(teacher: nn.Module, policy: HybridPolicy, data: Data, config: Config) -> nn.Module:
    """Returns the float model prepared for one policy: what plain quantization-aware training starts from."""
    network = torch_ao.prepare(teacher, policy, whole_zero_points=config.whole_zero_points)
    torch_ao.set_trainable(network, config.train_float is not False)
    device = next(p.device for p in teacher.parameters())
    calibrate_activations(network, data, config.filled().calibration_batches or 1, device)
    return network


def finetune_network(
    network: nn.Module,
    teacher: nn.Module,
    data: Data,
    loss: LossFunction,
    blocks: Sequence[str],
    config: Config,
    checkpoint: Checkpoint | None = None,
    stage: str = "",
    share: float = 1.0,
) -> tuple[list[dict[str, Any]], bool]:
    """Trains a network with a fixed policy in place.

    Args:
        network: A prepared network whose BatchNorm statistics fit its weights.
        teacher: The float model, in eval mode.
        data: Batches.
        loss: Distance to the teacher's output.
        blocks: Names of the blocks whose outputs count as well, by `config.block_loss`.
        config: Options.
        checkpoint: Where the state is kept; None keeps nothing.
        stage: Name of the stage there.
        share: Share of the rates of weights that nobody gave: 1, or one of `BACK_OFF`.

    Returns:
        The history, one `{"step", "loss", "batch_statistics"}` a step, and whether it is to be trained again, from
        where it began, at the next share: the first steps led away.
    """
    assert config.block_loss is not None
    assert config.temperature is not None
    steps = config.steps.finetune
    task = Task(
        name="fine-tuning",
        stage=stage if share == 1 else f"{stage} at {share:g} of the rates",
        network=network,
        teacher=teacher,
        data=data,
        loss=training_loss(loss, config.temperature),
        blocks=blocks,
        block_loss=config.block_loss,
        # What blocks give leads the way at first; in the end the output is what counts.
        blocks_until=BLOCKS_UNTIL,
        steps=steps,
        rates=Rates(config.learning_rate, config.step_learning_rate, share=share * share_of_steps(steps)),
        # Few networks end further away than the noise of batches' statistics; those train better with them.
        batch_statistics=None,
        distance=loss,
        # A rate that was given is taken as it is.
        backs_off=config.learning_rate is None and share > BACK_OFF[-1],
        checkpoint=checkpoint,
        show=config.progress,
    )
    with seeded(config.seed + 1), tracking(config):
        ended = train(task)
    if task.history:
        task.history[0].update(rates=share, start=config.finetune_from, rounding=config.rounding)
    return task.history, not ended


def warn_of_no_gain(steps: int, before: float, after: float) -> None:
    """Says that fine-tuning ended further from the float model than it began, unless its steps were a handful."""
    if steps < MANY_STEPS:
        return
    warnings.warn(
        f"{steps} steps of fine-tuning ended at a distance of {after:.4g} from the float model on held-out data, "
        f"and began at {before:.4g}: they are not taken. More and more various data, larger batches, or a lower "
        "learning_rate may help.",
        HQWarning,
        stacklevel=4,
    )
