"""What of a loss lasts after fine-tuning: additive losses as plans and the search weigh them.

Sensitivities and scores are of networks that are not fine-tuned yet. Training repairs some errors and not others:

- It repairs most of what rounding does to weights that every sample uses, and less of what it does to rows of an
  embedding, which it sees only when they are looked up. So what embeddings add counts more.
- It repairs what measured losses have beyond their second order (means and scales that moved). So the second order,
  by the Fisher information of the float model, is added to what is measured.
- It repairs most of what rounding does to weights, which it trains, and less of what it does to inputs. So of the
  second order inputs count more.
"""

from __future__ import annotations

import numpy as np

from hq_plugin.allocation import monotone
from hq_plugin.config import Config
from hq_plugin.cost import Table
from hq_plugin.space import Genome, Group, SearchSpace

#: What the loss of embeddings counts beside that of other layers, for networks that are trained. With dynamic
#: programming's policies for factors of 1, 2 and 4, MiniLM ended 200 steps of fine-tuning at losses of 0.053, 0.044
#: and 0.044 (docs/experiments.md).
EMBEDDINGS = 3.0
#: What the second order counts beside the measured losses, all groups together, at their narrowest. Dynamic
#: programming's policies for 0, 1 and 3 ended 100 steps on a MobileNetV3 at distances of 0.0227, 0.0176 and 0.0166
#: (means of three runs; docs/experiments.md).
SECOND_ORDER = 3.0
#: What the second order of inputs counts beside that of weights, where their widths are chosen as well. On a
#: MobileNetV3 under a limit of BitOps, policies planned by measured losses alone ended at a distance of 0.060, with
#: the second order of both at 0.051, and with this at 0.036 (docs/experiments.md).
INPUTS = 10.0
#: Steps of fine-tuning from which that holds in full; with fewer, less of the other layers' loss is repaired.
STEPS = 100


def counts_second_order(config: Config) -> bool:
    """Whether the second order is to be added to what is measured."""
    trains = config.steps.finetune > 0 and config.effort != "smoke"
    return config.sensitivities == "both" and trains


class LastingLosses:
    """Additive losses with what training does not repair weighed more.

    Args:
        space: The search space.
        sensitivities: `[groups, weight widths, activation widths]`, what each width costs alone.
        steps: Steps of fine-tuning to come; with none, losses stay as they are.
        second_order: `[groups, weight widths, activation widths]`, what each width costs alone to second order,
            weight's and input's added up; None where sensitivities are that, or where it is not known. Its unit
            does not matter: that of weights (of inputs, where these alone choose) counts `SECOND_ORDER` times as
            much as their sensitivities do.

    Attributes:
        table: The losses by which policies are planned, falling with each width.
        plain: The sensitivities, falling with each width.
    """

    def __init__(
        self, space: SearchSpace, sensitivities: Table, steps: int, second_order: Table | None = None
    ) -> None:
        share = min(1.0, steps / STEPS)
        lasts = np.array([1.0 if _only_looked_up(group) else 0.0 for group in space.groups])
        self.plain: Table = monotone(sensitivities)
        # Noise below 0 is no loss.
        loss = np.where(np.isfinite(self.plain), np.maximum(self.plain, 0.0), 0.0)
        self._added = share * (EMBEDDINGS - 1) * lasts[:, None, None] * loss
        if second_order is not None:
            falling = monotone(second_order)
            curved = np.where(np.isfinite(falling), np.maximum(falling, 0.0), 0.0)
            every = np.arange(len(loss))
            of_weights, of_inputs = curved[every, :, space.top[:, 1]], curved[every, space.top[:, 0], :]
            if space.top[:, 0].any():
                measured, narrowest = loss[every, 0, space.top[:, 1]], of_weights[:, 0]
                lasting = of_weights[:, :, None] + INPUTS * of_inputs[:, None, :]
            else:  # inputs alone choose
                measured, narrowest = loss[every, space.top[:, 0], 0], of_inputs[:, 0]
                lasting = of_inputs[:, None, :]
            scale = SECOND_ORDER * float(measured.sum()) / max(float(narrowest.sum()), 1e-30)
            self._added = self._added + share * scale * lasting
        self.table: Table = self.plain + self._added

    def added(self, genome: Genome) -> float:
        """Returns what is added to the measured distance of a policy, in the unit of that distance."""
        return float(self._added[np.arange(len(genome)), genome[:, 0], genome[:, 1]].sum())


def _only_looked_up(group: Group) -> bool:
    """Whether the weights of a group are used by look-ups alone: an embedding tied to a layer trains with it."""
    return all(site.kind == "embedding" for site in group.sites)
