"""What each width costs to second order: one number for each layer's weights and inputs, from a few batches.

The gradients are those of the float model (`moments.py`), the rounding that of the prepared network. Where there
are several processes, the first one's numbers count in all: they may differ in their last bits, and plans must not.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hq_plugin.batch import Batch
from hq_plugin.config import Config
from hq_plugin.cost import Table
from hq_plugin.distillation import LossFunction
from hq_plugin.distribution import map_split
from hq_plugin.errors import ConfigError, HQWarning
from hq_plugin.input_losses import input_losses
from hq_plugin.memory import out_of_memory
from hq_plugin.moments import Moments, collect_moments, fisher_losses
from hq_plugin.space import SearchSpace


def calibration_moments(
    teacher: nn.Module, space: SearchSpace, batches: Sequence[Batch], config: Config, loss: LossFunction
) -> dict[str, Moments]:
    """Returns the moments of the sites on a few batches.

    There are none where the model has no gradient, and sensitivities are measured and can do without.
    """
    try:
        return collect_moments(teacher, space.table, batches, config.seed, loss)
    except (ConfigError, RuntimeError) as error:
        if config.sensitivities == "fisher" or out_of_memory(error):
            raise
        warnings.warn(
            f"The second order of the loss is not known ({str(error).splitlines()[0]}): policies are planned by "
            "measured sensitivities alone.",
            HQWarning,
            stacklevel=2,
        )
        return {}


def weight_losses(
    network: nn.Module, space: SearchSpace, moments: Mapping[str, Moments]
) -> NDArray[np.float64] | None:
    """Returns what each width of each group's weights costs alone, `[groups, weight widths]`.

    Args:
        network: The prepared network, which gives the rounding.
        space: The search space.
        moments: Moments of the sites; none gives None.
    """

    def losses(moments: Mapping[str, Moments]) -> NDArray[np.float64]:
        return fisher_losses(network, space, moments)

    return map_split(losses, [moments])[0] if moments else None


def second_order(
    network: nn.Module,
    teacher: nn.Module,
    space: SearchSpace,
    batches: Sequence[Batch],
    config: Config,
    loss: LossFunction,
) -> Table | None:
    """Returns what each width of each group costs alone, weight's and input's added up.

    Args:
        network: The prepared network with calibrated inputs, which gives the rounding; it is not run.
        teacher: The float model, in eval mode; it is not changed.
        space: The search space.
        batches: A few batches, on the model's device.
        config: Options.
        loss: The distance.

    Returns:
        `[groups, weight widths, activation widths]`; None where the model has no gradient.
    """
    weights = weight_losses(network, space, calibration_moments(teacher, space, batches, config, loss))
    if weights is None:
        return None

    def losses(batches: Sequence[Batch]) -> NDArray[np.float64]:
        return input_losses(network, teacher, space, batches, config.seed, loss)

    return weights[:, :, None] + map_split(losses, [batches])[0][:, None, :]
