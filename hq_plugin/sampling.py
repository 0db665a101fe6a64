"""Which hybrid vectors meta-training sees: a seeded stream of policies.

The network must be good at every policy that the search may visit, so the stream covers the whole
range of sizes evenly, and the corners of the space (all widths smallest, all largest, all equal) often.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hq_plugin.cost import CostTable, Resource
from hq_plugin.policy import HybridPolicy
from hq_plugin.space import Genome, SearchSpace

#: Shares of the stream: corners (the extremes in turn), uniform policies; the rest is random.
EXTREMES, UNIFORM = 0.08, 0.17
#: Without a budget in sight, random policies have up to this many effective bits above the smallest:
#: the low end is the hard one, and 8-bit policies need no practice.
SPREAD_BITS = 2.5
#: With a budget in sight, random policies cost between these shares of it.
FOCUS = (0.9, 1.3)


class PolicySampler:
    """Draws policies.

    Args:
        space: The search space.
        costs: Its costs.
        seed: Two samplers with the same seed draw the same policies, on every process.
        focus: Resources of a budget around which random policies are drawn; empty for none.
    """

    def __init__(self, space: SearchSpace, costs: CostTable, seed: int, focus: Sequence[Resource] = ()) -> None:
        self.space, self.seed = space, seed
        self.focus = list(focus)
        if not self.focus:
            least = costs.costs(np.zeros(space.shape, dtype=np.int64)).weight_bits
            capacity = (least + SPREAD_BITS) * space.table.weights / 8
            self.focus = [Resource("weight_bits", costs.weight_bytes, capacity)]
            smallest = float(costs.weight_bytes.min(axis=(1, 2)).sum())
            self.range = (smallest / capacity, 1.0)
        else:
            self.range = FOCUS
        self._free = np.argwhere(space.top > 0)

    def __call__(self, step: int) -> HybridPolicy:
        """Returns the policy of a training step; it depends on the seed and the step alone."""
        rng = np.random.RandomState([self.seed, step])
        draw = rng.random()
        top = self.space.top
        if draw < EXTREMES:
            return self.space.policy(top if step % 2 else np.zeros_like(top))
        if draw < EXTREMES + UNIFORM:
            weight, activation = rng.choice(self.space.weight_bits), rng.choice(self.space.activation_bits)
            return self.space.policy(self.space.nearest_uniform(int(weight), int(activation)))
        return self.space.policy(self._random(rng))

    def _random(self, rng: np.random.RandomState) -> Genome:
        """Draws each index at random, then walks at random until the cost is near a random target."""
        genome: Genome = rng.randint(0, self.space.top + 1)
        if len(self._free) == 0:
            return genome
        target = rng.uniform(*self.range)
        walk = self._free[rng.randint(len(self._free), size=40 * len(self._free))]
        over = max(resource.used(genome) for resource in self.focus) > target
        for row, column in walk:
            moved = genome[row, column] + (-1 if over else 1)
            if not 0 <= moved <= self.space.top[row, column]:
                continue
            genome[row, column] = moved
            if (max(resource.used(genome) for resource in self.focus) > target) != over:
                break
        return genome
