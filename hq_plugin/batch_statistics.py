"""Whether BatchNorm trains better with the statistics of each batch or with the running ones it will run with.

A batch's own statistics let weights move further in a step, and widths are narrow enough to need it; but they are
noisy, and a network that is closer to its teacher than that noise learns the noise. So they are used where the
network is further away (docs/experiments.md has the figures).
"""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hq_plugin.data import Data
from hq_plugin.distillation import LossFunction
from hq_plugin.held_out import held_out_distance
from hq_plugin.modes import set_training_modes
from hq_plugin.sharding import runnable

#: The distance from which they are used, in units of their noise. Networks from 2.7 on ended 5 to 22 % closer with
#: them, but for one at 2.8 (4 % further), and those below further by up to a third (docs/experiments.md).
NOISE = 2.5
#: The least momentum with which running statistics follow. Weights keep moving: remembering for 33 steps and more
#: cost half of what was gained, and networks trained for long before come with a memory of 100 or 1,000.
_MOMENTUM = 0.1


@torch.no_grad()
def batch_statistics_pay(
    network: nn.Module, teacher: nn.Module, data: Data, loss: LossFunction, accelerator: Accelerator
) -> bool:
    """Returns whether a network is further from its teacher than `NOISE` times what batches' statistics cost.

    That cost is the distance between the teacher with each batch's own statistics and the teacher itself.

    Args:
        network: The student, in the mode in which it would train with running statistics.
        teacher: The float model, in eval mode; it is not changed.
        data: Its held-out batches are run.
        loss: Distance of outputs.
        accelerator: Brings processes together: each measures its share of a batch, whose statistics it would take.
    """
    size = data.holdout[0].size
    # One sample has no variance. All processes must say the same, and their shares of a batch may differ by one.
    if size < 2 * accelerator.num_processes:
        return False
    if not _batchnorms(network):
        return False
    noisy = runnable(copy.deepcopy(teacher))
    set_training_modes(noisy, batch_statistics=True)
    distance, noise = (held_out_distance(student, teacher, data, loss, accelerator) for student in (network, noisy))
    return distance > NOISE * noise


def follow_batches(network: nn.Module) -> None:
    """Lets BatchNorm normalise by each batch's statistics, and the running ones follow within some ten steps."""
    set_training_modes(network, batch_statistics=True)
    for module in _batchnorms(network):
        module.momentum = max(module.momentum or 0.0, _MOMENTUM)


@torch.no_grad()
def agree_on_statistics(network: nn.Module, accelerator: Accelerator) -> None:
    """Gives all processes, each of which saw its share of the batches, the mean of their running statistics."""
    for module in _batchnorms(network):
        for kept in (module.running_mean, module.running_var):
            if kept is not None:
                kept.copy_(accelerator.reduce(kept.clone(), "mean"))


def _batchnorms(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]
