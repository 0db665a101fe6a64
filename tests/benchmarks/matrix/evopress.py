"""EvoPress: evolution by level switches under a budget (Sieberling et al., arXiv:2410.14649, algorithm 1).

One parent. Each offspring raises some layers by a level and lowers others until the budget is kept. Selection goes
through several rounds: many offspring on few samples, the survivors on more, the last with the parent on all.
Where the paper's layers have one size, so that one raised pays for one lowered, ours differ: as many are lowered as
the budget asks for, and what is then left over is filled up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hq_plugin.cost import Resource
from hq_plugin.policy import HybridPolicy
from hq_plugin.space import Genome, SearchSpace
from tests.benchmarks.matrix.budget_moves import filled, lowered, random_genome

#: Scores a policy on a share of a candidate's samples; the lower the better.
PartialScore = Callable[[HybridPolicy, float], float]
#: Offspring of a generation, and (survivors, share of the samples) of each round of selection.
OFFSPRING, ROUNDS = 16, ((4, 0.25), (2, 0.5), (1, 1.0))
#: Random policies of which the best is the first parent.
FIRST = 8


@dataclass
class Evolved:
    """What EvoPress found.

    Attributes:
        genome: The best genome.
        score: Its score on all samples.
        scored: Policies scored, on however many samples.
        evaluations: The same in units of a policy on all samples of a candidate.
        curve: `[evaluations, best score so far]` after each generation.
    """

    genome: Genome
    score: float
    scored: int = 0
    evaluations: float = 0.0
    curve: list[list[float]] = field(default_factory=list)


def switched(
    genome: Genome, top: Genome, resources: Sequence[Resource], rng: np.random.RandomState
) -> Genome | None:
    """Returns a mutant inside the budget, or None where this draw has none."""
    mutant, raised = genome.copy(), []
    for _ in range(min(rng.randint(1, 4), rng.randint(1, 4))):  # mostly one switch, as in the paper
        below = np.argwhere(mutant < top)
        if len(below) == 0:
            break
        row, column = below[rng.randint(len(below))]
        mutant[row, column] += 1
        raised.append(int(row))
    fitting = lowered(mutant, resources, rng, raised)
    return None if fitting is None else filled(fitting, top, resources, rng)


def evolve(
    space: SearchSpace,
    resources: Sequence[Resource],
    score: PartialScore,
    evaluations: int,
    seed: int,
    start: Sequence[Genome] = (),
) -> Evolved:
    """Searches a policy.

    Args:
        space: The search space.
        resources: The limits.
        score: Scores a policy on a share of the samples.
        evaluations: What the search may spend, in policies on all samples.
        seed: Of what is random.
        start: Genomes that are filled up and tried as first parents beside random ones.
    """
    rng, top = np.random.RandomState(seed), space.top
    found = Evolved(np.zeros_like(top), float("inf"))

    def scored(genome: Genome, share: float) -> float:
        found.scored += 1
        found.evaluations += share
        return score(space.policy(genome), share)

    first = [filled(genome, top, resources, rng) for genome in start]
    first += [random_genome(space, resources, rng) for _ in range(max(1, FIRST - len(first)))]
    values = [scored(genome, 1.0) for genome in first[: max(1, evaluations)]]
    found.genome, found.score = first[int(np.argmin(values))], min(values)
    found.curve.append([found.evaluations, found.score])
    while found.evaluations + _cost() <= evaluations:
        drawn = [switched(found.genome, top, resources, rng) for _ in range(4 * OFFSPRING)]
        unique = {genome.tobytes(): genome for genome in drawn if genome is not None}
        unique.pop(found.genome.tobytes(), None)
        pool = list(unique.values())[:OFFSPRING]
        if not pool:
            break
        for survivors, share in ROUNDS:
            values = [scored(genome, share) for genome in pool]
            order = np.argsort(values)[:survivors]
            pool, best = [pool[i] for i in order], values[order[0]]
        if best < found.score:  # the parent's score on all samples is known
            found.genome, found.score = pool[0], best
        found.curve.append([found.evaluations, found.score])
    return found


def _cost() -> float:
    """What a generation spends, in policies on all samples."""
    entering = [OFFSPRING, *(survivors for survivors, _ in ROUNDS[:-1])]
    return sum(count * share for count, (_, share) in zip(entering, ROUNDS, strict=True))
