"""Step 1 of the method: the MetaQuantNet learns to generate weights for any policy.

Section 3.2 of arXiv:2004.11506. Every step samples a hybrid vector, lets the MetaQuantNet generate the
network's weights for it, and distils the float model into the result. This does not depend on a
budget; where one is known, policies are sampled around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hq_plugin import torch_ao
from hq_plugin.checkpoint import Checkpoint
from hq_plugin.config import Config
from hq_plugin.data import Data
from hq_plugin.distillation import LossFunction, training_loss
from hq_plugin.metaquantnet import MetaQuantNet
from hq_plugin.policy import HybridPolicy
from hq_plugin.rates import Rates
from hq_plugin.scoring import calibrate_activations
from hq_plugin.seeding import seeded
from hq_plugin.space import SearchSpace
from hq_plugin.tracking import tracking
from hq_plugin.training import Task, train

#: The network's own weights learn at this share of the rate of what generates them: they are shared by
#: all widths, and fine-tuning starts better where they stayed near the float model.
BASE_RATE = 0.3
#: The learning rate ends at this share of its peak: fine-tuning goes on from here, and a rate that
#: falls to 0 and rises again wastes the steps in between.
FINAL_RATE = 0.3


def build_network(
    teacher: nn.Module,
    space: SearchSpace,
    data: Data,
    config: Config,
    importance: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Returns the network that a new MetaQuantNet drives, with calibrated activations.

    Args:
        teacher: The float model.
        space: The search space.
        data: Gives the calibration batches.
        config: Options.
        importance: Second moments of the inputs of sites, by name, where they are known.
    """
    weights = {site.name: teacher.get_submodule(site.name)._parameters["weight"] for site in space.table}
    with seeded(config.seed):
        metaquantnet = MetaQuantNet(space, weights, config, importance)  # type: ignore[arg-type]
    network = torch_ao.prepare(teacher, space.policy(space.top), metaquantnet=metaquantnet)
    torch_ao.set_trainable(network, config.train_float is not False)
    device = next(p.device for p in teacher.parameters())
    calibrate_activations(network, data, config.filled().calibration_batches or 1, device)
    return network


def meta_train_network(
    network: nn.Module,
    teacher: nn.Module,
    sampler: Callable[[int], HybridPolicy],
    data: Data,
    loss: LossFunction,
    blocks: Sequence[str],
    config: Config,
    checkpoint: Checkpoint | None = None,
) -> list[dict[str, Any]]:
    """Meta-trains a network in place.

    Args:
        network: What `build_network` returned.
        teacher: The float model, in eval mode.
        sampler: Gives the policy of each step.
        data: Batches.
        loss: Distance to the teacher's output.
        blocks: Names of the blocks whose outputs count as well, by `config.block_loss`.
        config: Options.
        checkpoint: Where the state is kept; None keeps nothing.

    Returns:
        One `{"step", "loss", "batch_statistics"}` for each step.
    """
    assert config.block_loss is not None
    assert config.temperature is not None
    task = Task(
        name="meta-training",
        network=network,
        teacher=teacher,
        data=data,
        loss=training_loss(loss, config.temperature),
        blocks=blocks,
        block_loss=config.block_loss,
        steps=config.steps.meta,
        rates=Rates(
            config.learning_rate,
            config.step_learning_rate,
            # A table generates nothing: the weights are all that it can train.
            base=1.0 if config.block == "table" else BASE_RATE,
            final=FINAL_RATE,
        ),
        before_step=lambda running, step: torch_ao.apply_policy(running, sampler(step)),
        checkpoint=checkpoint,
        stage="meta-training",
        show=config.progress,
    )
    with seeded(config.seed), tracking(config):
        train(task)
    return task.history
