"""Moves of genomes under a budget that know nothing of losses: what rival searches are made of.

hq_plugin's own repair plans with sensitivities; rivals must not have them from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hq_plugin.cost import Resource
from hq_plugin.space import Genome, SearchSpace


def keeps(genome: Genome, resources: Sequence[Resource]) -> bool:
    """Whether a genome keeps every limit."""
    return all(resource.used(genome) <= 1 for resource in resources)


def lowered(
    genome: Genome, resources: Sequence[Resource], rng: np.random.RandomState, keep: Sequence[int] = ()
) -> Genome | None:
    """Takes random widths down one step each until every limit is kept.

    Args:
        genome: A genome; it is not changed.
        resources: The limits.
        rng: Source of randomness.
        keep: Groups whose widths stay.

    Returns:
        The genome, or None where the widths that may move are all at their smallest.
    """
    genome = genome.copy()
    while not keeps(genome, resources):
        free = [place for place in np.argwhere(genome > 0) if place[0] not in keep]
        if not free:
            return None
        row, column = free[rng.randint(len(free))]
        genome[row, column] -= 1
    return genome


def filled(genome: Genome, top: Genome, resources: Sequence[Resource], rng: np.random.RandomState) -> Genome:
    """Takes random widths up one step each, as long as one fits."""
    genome = genome.copy()
    open_places = [tuple(place) for place in np.argwhere(genome < top)]
    while open_places:
        place = open_places[rng.randint(len(open_places))]
        genome[place] += 1
        if not keeps(genome, resources):
            genome[place] -= 1
            # What does not fit now will not fit later: there is only less room.
            open_places.remove(place)
        elif genome[place] == top[place]:
            open_places.remove(place)
    return genome


def random_genome(space: SearchSpace, resources: Sequence[Resource], rng: np.random.RandomState) -> Genome:
    """Returns a random genome that uses the budget up: uniform widths, taken down or up at random until it does."""
    top = space.top
    genome: NDArray[np.int64] = np.array(
        [[rng.randint(weight + 1), rng.randint(activation + 1)] for weight, activation in top]
    )
    fitting = lowered(genome, resources, rng)
    return filled(np.zeros_like(top) if fitting is None else fitting, top, resources, rng)
