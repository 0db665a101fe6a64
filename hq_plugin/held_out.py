"""How far a network in training is from its teacher on held-out data, by which training decides how to go on."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from hq_plugin.data import Data
from hq_plugin.distillation import LossFunction
from hq_plugin.distribution import share_of_batch

#: Batches on which it is measured.
_BATCHES = 8


@torch.no_grad()
def held_out_distance(
    network: nn.Module, teacher: nn.Module, data: Data, loss: LossFunction, accelerator: Accelerator
) -> float:
    """Returns the distance of a network from its teacher on a few held-out batches, the same in all processes.

    Args:
        network: The student, in the mode in which it is to be measured.
        teacher: The float model, in eval mode.
        data: Its held-out batches are run, but for a smaller last one, which is noisier.
        loss: Distance of outputs.
        accelerator: Brings processes together: each measures its share of a batch.
    """
    size = data.holdout[0].size
    total = torch.zeros((), device=accelerator.device)
    for whole in [batch for batch in data.holdout if batch.size == size][:_BATCHES]:
        batch, weight = share_of_batch(whole.to(accelerator.device))
        total += weight * loss(batch.run(network), batch.run(teacher)).float()
    return float(accelerator.reduce(total, "mean"))
