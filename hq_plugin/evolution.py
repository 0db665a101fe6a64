"""The genetic algorithm of the search, in nevergrad's terms; nothing else imports nevergrad.

A genome is a policy as whole numbers. Its operators are those of section 3.3 of arXiv:2004.11506, mutation and
crossover, with a repair into the budget after each. Which genomes are asked for and scored is `search.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Container
from typing import Any

import nevergrad as ng
import numpy as np
from nevergrad.common.errors import LossTooLargeWarning

from hq_plugin.repair import Repair, moved
from hq_plugin.space import Genome

#: How often a candidate that was scored before is mutated again before it is given up.
_RETRIES = 4


class PolicyGenome(ng.p.Array):
    """A genome as a nevergrad parameter, with the operators of the genetic algorithm.

    Mutation is `repair.moved`; crossover takes each group's widths from one of two parents. Both end in repair.
    """

    def __init__(self, genome: Genome, repair: Repair, known: Container[bytes]) -> None:
        super().__init__(init=genome.astype(float))
        self._repair, self._known = repair, known

    @property
    def genome(self) -> Genome:
        """The genome as integers."""
        return np.asarray(self.value).round().astype(np.int64)

    @property
    def key(self) -> bytes:
        """What equal genomes have in common."""
        return self.genome.tobytes()

    def _set(self, genome: Genome) -> None:
        self.value = self._repair(genome).astype(float)

    def mutate(self) -> None:
        """Moves some genes and repairs, again if that gives a genome that was scored before."""
        start = self.genome
        for _ in range(_RETRIES):
            genome = moved(start, self._repair.top, self.random_state)
            self._set(genome)
            if self.key not in self._known:
                break

    def recombine(self, *others: PolicyGenome) -> None:  # type: ignore[override]
        """Takes each group's widths from this parent or from another, and repairs."""
        genome = self.genome
        for other in others:
            taken = self.random_state.rand(len(genome)) < 0.5
            genome[taken] = other.genome[taken]
        self._set(genome)

    def sample(self) -> PolicyGenome:
        """Returns a new individual for the first population: several mutations away from this one."""
        child = self.spawn_child()
        for _ in range(3):
            child.mutate()
        child._set_parenthood(None)
        return child


def evolution(
    start: Genome,
    repair: Repair,
    known: Container[bytes],
    rng: np.random.RandomState,
    population: int,
    crossover: float,
    evaluations: int,
) -> Any:
    """Returns nevergrad's evolution strategy over genomes: `ask`, `tell` and `suggest`.

    Args:
        start: The genome that the population starts from.
        repair: Brings a genome into the budget.
        known: Keys of the genomes that were scored.
        rng: Source of randomness.
        population: Genomes that survive a generation, and their offspring.
        crossover: Probability that an offspring is recombined with a second parent.
        evaluations: How many genomes will be scored.
    """
    parameter = PolicyGenome(start, repair, known)
    parameter.random_state = rng
    family = ng.families.EvolutionStrategy(
        recombination_ratio=crossover,
        popsize=population,
        offsprings=population,
        only_offsprings=False,
        ranker="simple",
    )
    with warnings.catch_warnings():
        # nevergrad calls budgets below 60 inefficient; "smoke" knows.
        warnings.simplefilter("ignore")
        return family(parameter, budget=10 * evaluations)


__all__ = ["LossTooLargeWarning", "PolicyGenome", "evolution"]
