"""Which hybrid vectors meta-training sees: a seeded stream of policies near the best that are known.

The search will only ever visit good policies, so practice on others is wasted: random policies of the
same cost are several times worse, and what a network learns on them does not serve the good ones. The
stream therefore follows the front of additive sensitivities (AttentiveNAS, arXiv:2011.09011, does the
same for supernets): around the policy that dynamic programming plans for a budget, where one is known,
and along a ladder of budgets where none is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hq_plugin.allocation import dynamic_programming
from hq_plugin.cost import CostTable, Resource, Table
from hq_plugin.policy import HybridPolicy
from hq_plugin.repair import NOISE, Repair, moved
from hq_plugin.space import Genome, SearchSpace

#: Without a budget in sight, the ladder reaches from the smallest policy to this many effective bits above:
#: the low end is the hard one, and 8-bit policies need no practice.
SPREAD_BITS = 2.5
#: Rungs of the ladder, each a limit on weights; and shares of the BitOps of a rung's policy to which its
#: activations are limited as well, where they may choose.
RUNGS, BITOPS_SHARES = 8, (1.0, 0.75, 0.5)
#: Without a budget in sight, shares of the stream that are the widest policy and uniform policies.
WIDEST, UNIFORM = 0.05, 0.1


class PolicySampler:
    """Draws policies.

    Args:
        space: The search space.
        costs: Its costs.
        losses: Additive losses, as for `allocation.dynamic_programming`.
        seed: Two samplers with the same seed draw the same policies, on every process.
        focus: Limits of a budget; empty for none.
    """

    def __init__(
        self, space: SearchSpace, costs: CostTable, losses: Table, seed: int, focus: Sequence[Resource] = ()
    ) -> None:
        self.space, self.losses, self.seed = space, losses, seed
        self.focused = bool(focus)
        #: Limits, and the policy from which those that keep them are drawn.
        self.plans: list[tuple[list[Resource], Genome]] = (
            [(list(focus), dynamic_programming(losses, focus))] if focus else self._ladder(costs)
        )
        self._repairs: dict[int, Repair] = {}

    def _ladder(self, costs: CostTable) -> list[tuple[list[Resource], Genome]]:
        """Plans from wide to narrow; each starts from the one before, so that all cost one descent."""
        space, plans = self.space, []
        smallest = float(costs.weight_bytes.min(axis=(1, 2)).sum())
        widest = float(Resource("weight_bits", costs.weight_bytes, 1.0).spent(space.top))
        most = min(smallest + SPREAD_BITS * space.table.weights / 8, widest)
        shares = BITOPS_SHARES if space.top[:, 1].any() else (1.0,)
        rung = space.top
        for capacity in np.linspace(most, smallest, RUNGS + 1)[:-1]:
            limits = [Resource("weight_bits", costs.weight_bytes, float(capacity))]
            rung = self._descend(limits, rung)
            spent = Resource("bitops", costs.bitops, 1.0).spent(rung)
            least = float(costs.bitops.min(axis=(1, 2)).sum())
            genome = rung
            for share in shares:
                if share < 1:
                    limited = [*limits, Resource("bitops", costs.bitops, max(share * spent, 1.05 * least))]
                    genome = self._descend(limited, genome)
                    plans.append((limited, genome))
                else:
                    plans.append((limits, rung))
        return plans

    def _descend(self, limits: Sequence[Resource], genome: Genome) -> Genome:
        rng = np.random.RandomState(self.seed)
        return Repair(self.losses, limits, self.space.top, rng, noise=0.0)(genome)

    def __call__(self, step: int) -> HybridPolicy:
        """Returns the policy of a training step; it depends on the seed and the step alone."""
        rng = np.random.RandomState([self.seed, step])
        space = self.space
        draw = rng.random()
        if not self.focused and draw < WIDEST:
            return space.policy(space.top)
        if not self.focused and draw < WIDEST + UNIFORM:
            weight, activation = rng.choice(space.weight_bits), rng.choice(space.activation_bits)
            return space.policy(space.nearest_uniform(int(weight), int(activation)))
        number = rng.randint(len(self.plans))
        limits, planned = self.plans[number]
        if number not in self._repairs:
            self._repairs[number] = Repair(self.losses, limits, space.top, rng, noise=NOISE)
        repair = self._repairs[number]
        repair.rng = rng
        return space.policy(repair(moved(planned, space.top, rng)))
