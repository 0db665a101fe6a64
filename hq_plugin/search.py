"""Step 2 of the method: the genetic search for the best widths under a budget, on nevergrad (`evolution.py`).

Section 3.3 of arXiv:2004.11506. The population starts from the exact dynamic-programming solution of
additive sensitivities and from the best uniform policies. Offspring are made by mutation and uniform
crossover and are repaired into the budget, so that no candidate ever exceeds it. The score of a
candidate is given from outside (`scoring.py`); the lower the better. A generation is scored at once, so that
several processes can share it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hq_plugin.allocation import dynamic_programming
from hq_plugin.config import Config
from hq_plugin.cost import Resource, Table
from hq_plugin.errors import TrainingError
from hq_plugin.lasting import LastingLosses
from hq_plugin.policy import HybridPolicy
from hq_plugin.progress import progress
from hq_plugin.repair import Repair
from hq_plugin.space import Genome, SearchSpace
from hq_plugin.tracking import track, tracking

#: Scores policies; the lower the better.
Score = Callable[[Sequence[HybridPolicy]], list[float]]

#: How many of the best are returned, but no more than a sixth of what was scored.
_LEADERS = 8
#: The search ends when so many generations brought no new policy: a small space is exhausted.
_STALE = 5


@dataclass(frozen=True)
class Scored:
    """A policy that the search scored.

    Attributes:
        genome: The policy in the space's encoding.
        score: Its distance to the float model; infinite where it was not finite.
    """

    genome: Genome
    score: float


@dataclass
class SearchResult:
    """What a search found.

    Attributes:
        leaders: The best policies, best first.
        evaluations: Every policy in the order in which it was scored.
        seconds: Wall time of the whole search.
        scoring_seconds: The part of it that was spent in scoring.
    """

    leaders: list[Scored]
    evaluations: list[Scored]
    seconds: float
    scoring_seconds: float
    seeds: dict[str, list[Genome]] = field(default_factory=dict)


#: A rise from which on a network says nothing any more, and how much worse than all others such a width counts.
_HUGE, _WORSE = 1e6, 10.0


def additive_sensitivities(
    space: SearchSpace,
    score: Score,
    show: bool | None = None,
    weights: NDArray[np.float64] | None = None,
    *,
    narrowest: bool = False,
) -> Table:
    """Measures what each width of each group costs alone, with every other at its widest.

    Args:
        space: The search space.
        score: Scores policies; lower is better.
        show: Whether to show a progress bar.
        weights: `[groups, weight widths]`, what weight widths cost where that is known; None measures it.
        narrowest: Whether only the narrowest width is measured, and each further bit is taken to quarter the rise,
            as it quarters the square of a rounding error. That is rough, and costs little.

    Returns:
        `[groups, weight widths, activation widths]`: the rise of the score over that of the widest
        policy, the weight's and the activation's added up; infinite where a group lacks the width.

    Raises:
        TrainingError: The score of the widest policy is not finite.
    """
    top = space.top
    shape = (len(space.groups), int(top[:, 0].max()) + 1, int(top[:, 1].max()) + 1)
    rise = (np.full(shape[:2], np.inf), np.full((shape[0], shape[2]), np.inf))
    columns = (0, 1) if weights is None else (1,)
    if weights is not None:
        rise = (weights, rise[1])
    (base,) = score([space.policy(top)])
    if not np.isfinite(base):
        raise TrainingError(
            f"The loss of the widest policy on held-out data is {base} before step 0. Look at the data, the model "
            "(does its own output hold NaN?) and the loss function."
        )
    found: dict[tuple[int, int, int], float] = {}
    with progress(show) as bars:
        measured = np.minimum(top, 1) if narrowest else top
        bar = bars.task("sensitivities", total=int(measured[:, list(columns)].sum()))
        for row in range(shape[0]):
            places = [(column, index) for column in columns for index in range(int(measured[row, column]))]
            policies = []
            for column, index in places:
                genome = top.copy()
                genome[row, column] = index
                policies.append(space.policy(genome))
            for (column, index), value in zip(places, score(policies) if policies else [], strict=True):
                found[column, row, index] = value - base
            bar.advance(len(places))
    # An output that overflows at one width must not make all other losses nothing beside it.
    worst = max([1.0, *(_WORSE * value for value in found.values() if value < _HUGE)])
    for (column, row, index), value in found.items():
        rise[column][row, index] = value if value < _HUGE else worst
    for column in columns:
        for row, group in enumerate(space.groups):
            rise[column][row, top[row, column]] = 0.0
            if narrowest:
                bits = (group.weight_bits, group.activation_bits)[column]
                rise[column][row, : len(bits)] = rise[column][row, 0] * _quartered(bits)
    table: Table = rise[0][:, :, None] + rise[1][:, None, :]
    return table


def _quartered(widths: Sequence[int]) -> NDArray[np.float64]:
    """Returns the rise at each of some widths as a share of that at the first; none at the last."""
    left = 0.25 ** (np.array(widths, dtype=np.float64) - widths[0])
    return (left - left[-1]) / (1 - left[-1]) if len(widths) > 1 else np.zeros(1)


def genetic_search(
    space: SearchSpace,
    resources: Sequence[Resource],
    losses: LastingLosses,
    score: Score,
    config: Config,
    uniform: Sequence[Genome],
) -> SearchResult:
    """Searches the policy of the lowest score that keeps every limit.

    Args:
        space: The search space.
        resources: The limits.
        losses: Additive losses; what they add to a score counts as well.
        score: Scores policies; lower is better. Each policy is given to it once.
        config: Gives the number of evaluations, the population, crossover and seed.
        uniform: The best uniform genomes inside the budget.
    """
    # nevergrad takes more than a second to import, and most who import hq_plugin never search.
    from hq_plugin.evolution import LossTooLargeWarning, evolution

    began, scoring = time.perf_counter(), 0.0
    rng = np.random.RandomState(config.seed)
    repair = Repair(losses.table, resources, space.top, rng)
    planned = dynamic_programming(losses.table, resources)
    known: dict[bytes, Scored] = {}

    def lasting(scored: Scored) -> float:
        return scored.score + losses.added(scored.genome)

    budget = max(config.steps.evaluations, 1)

    population = min(config.population, max(2, budget // 3))
    optimizer = evolution(planned, repair, known, rng, population, config.crossover, budget)
    # They enter filled up, for several limits at once leave a plan room; as they are, uniform policies and the plan
    # are baselines, which the caller measures.
    filled = Repair(losses.table, resources, space.top, np.random.RandomState(config.seed))(planned)
    starts = [filled, *(repair(genome) for genome in uniform)]
    for genome in reversed(starts):
        optimizer.suggest(genome.astype(float))

    with progress(config.progress) as bars, tracking(config), warnings.catch_warnings():
        warnings.simplefilter("ignore", LossTooLargeWarning)  # the worst score is meant to be large
        bar = bars.task("search", total=budget)
        stale = 0
        while len(known) < budget and stale < _STALE:
            generation: list[Any] = [optimizer.ask() for _ in range(population)]
            new: dict[bytes, Genome] = {}
            for candidate in generation:
                if candidate.key not in known and len(known) + len(new) < budget:
                    new.setdefault(candidate.key, candidate.genome)
            stale = 0 if new else stale + 1
            began_scoring = time.perf_counter()
            values = score([space.policy(genome) for genome in new.values()]) if new else []
            scoring += time.perf_counter() - began_scoring
            for (key, genome), value in zip(new.items(), values, strict=True):
                known[key] = Scored(genome, value if np.isfinite(value) else float("inf"))
            if new:
                lowest = min(scored.score for scored in known.values())
                bar.advance(len(new), best=lowest)
                track("search", len(known) - 1, best=lowest, generation=float(np.mean(values)))
            for candidate in generation:
                if candidate.key in known:
                    # A large finite number, since nevergrad compares losses by arithmetic.
                    optimizer.tell(candidate, min(lasting(known[candidate.key]), 1e30))
    evaluations = list(known.values())
    best = sorted(evaluations, key=lasting)[: min(_LEADERS, max(1, budget // 6))]
    return SearchResult(
        best,
        evaluations,
        time.perf_counter() - began,
        scoring,
        {"dynamic_programming": [planned], "uniform": list(uniform)},
    )
