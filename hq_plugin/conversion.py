"""Step 4 of the method: a trained network becomes packed layers, and does what it did before.

Kernels are chosen where the result is to run in PyTorch. One batch tells whether anything was lost: a user's module
may do what no conversion keeps.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from hq_plugin import torch_ao
from hq_plugin.batch import Batch
from hq_plugin.budget import Budget
from hq_plugin.config import Config
from hq_plugin.distillation import tensors_of
from hq_plugin.errors import HQWarning
from hq_plugin.kernels import choose_by
from hq_plugin.modes import in_eval_mode
from hq_plugin.nn import cache_weights
from hq_plugin.preparation import device_of
from hq_plugin.profiling import first_samples

#: Relative error of outputs from which a warning is due. Kernels in bfloat16 make 1 %, and an input whose rounding
#: flips some; what conversion loses is of the size of the output.
_SAME = 0.1
#: Samples that are compared, where the model takes so few: what is lost shows in any.
_COMPARED = 4


def convert_network(
    network: nn.Module, batch: Batch, config: Config, budget: Budget | None, device: torch.device
) -> nn.Module:
    """Converts a prepared network.

    Args:
        network: What fine-tuning ended with; it is left as it was.
        batch: What kernels are measured on, and what is compared.
        config: Gives the target.
        budget: With a latency, kernels are measured on as many samples as it names.
        device: Where the result is to be.

    Returns:
        The packed model; a warning says if its outputs are not those of `network`.
    """
    # accelerate may have trained on another device than the one that the model came from.
    packed = torch_ao.convert(network).to(device)
    timed = budget is not None and budget.latency_ms is not None
    if config.target == "torch" or (config.target == "storage" and timed):
        part = first_samples(batch, budget.batch if budget is not None and timed else batch.size).to(device)
        choose_by(packed, lambda: part.run_whole(packed))
    error = _difference(network, packed, batch)
    if error > _SAME:
        warnings.warn(
            f"The converted model's outputs are {error:.0%} off those of the network that was trained, whose "
            "distance is reported: something in the model does not survive conversion (a layer that is called "
            "through code of its own, a random number in forward). hq_plugin.evaluate measures what it is.",
            HQWarning,
            stacklevel=4,
        )
    return packed


@torch.no_grad()
def _difference(network: nn.Module, packed: nn.Module, batch: Batch) -> float:
    """Returns the relative error of a packed model's outputs on a batch, of those that are finite in both."""
    with in_eval_mode(network), in_eval_mode(packed):
        batch = batch.to(device_of(network)).taken_by(network, _COMPARED)
        wanted = tensors_of(batch.run(network))
        found = tensors_of(batch.to(device_of(packed)).run(packed))
    cache_weights(packed, True)  # what ran keeps no float weights before the user runs it
    size = error = 0.0
    for one, other in zip(wanted, found, strict=True):
        one, other = one.float().cpu(), other.float().cpu()
        apart = (one - other)[torch.isfinite(one) & torch.isfinite(other)]
        size, error = size + float(one[torch.isfinite(one)].square().sum()), error + float(apart.square().sum())
    return (error / size) ** 0.5 if size else 0.0
