"""A limit of latency that is kept by measurement, and not by prediction alone.

A profile adds up the times of layers; a runtime fuses them, or converts between them, and the sum is off. So what a
search found is timed whole. Where it takes too long, the search is repeated under a limit that is lower by as much;
where that does not help, a baseline that keeps the limit is taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

from hq_plugin.budget import Budget
from hq_plugin.errors import BudgetError, HQWarning
from hq_plugin.found import Found
from hq_plugin.policy import HybridPolicy

#: Searches, each under a lower limit than the one before.
ROUNDS = 3
#: What is this much above the limit may only have been disturbed, and is timed again: noise makes nothing faster.
_PERHAPS_NOISE = 1.1


def search_and_time(
    search: Callable[[Budget], Found], milliseconds: Callable[[HybridPolicy], float], budget: Budget
) -> Found:
    """Searches until what is found keeps the latency of a budget when it is run.

    Args:
        search: Finds a policy under limits, by the profile.
        milliseconds: Times a model under a policy.
        budget: Limits latency.

    Returns:
        What was found, with the latency that was measured in its costs; `used` is as the search left it. Where
        nothing keeps the limit it is the fastest that was timed, with a warning.

    Raises:
        BudgetError: By the profile, no policy keeps the budget.
    """
    limit = budget.latency_ms
    assert limit is not None
    searches: list[Found] = []
    timed: list[tuple[float, Found]] = []
    for found in _candidates(search, budget, searches, timed):
        if any(found.policy == other.policy for _, other in timed):
            continue
        took = milliseconds(found.policy)
        if limit < took <= _PERHAPS_NOISE * limit:
            took = min(took, milliseconds(found.policy))
        timed.append((took, found))
        if took <= limit:
            break
    took, found = min(timed, key=lambda pair: pair[0])
    if took > limit:
        warnings.warn(
            f"The model takes {took:.3g} ms, where {limit:.3g} were asked for: the times of its layers do not add "
            f"up to its own, and none of {len(timed)} policies that should have kept the limit did. Ask for "
            f'"{1.02 * took:.3g}ms", or give one width for inputs, such as activation_bits=8.',
            HQWarning,
            stacklevel=2,
        )
    costs = replace(found.costs, latency_ms=took)
    chosen = replace(found.baselines[found.chosen], costs=costs)
    return replace(
        found,
        costs=costs,
        baselines={**found.baselines, found.chosen: chosen},
        seconds={name: sum(one.seconds[name] for one in searches) for name in found.seconds},
    )


def _candidates(
    search: Callable[[Budget], Found], budget: Budget, searches: list[Found], timed: list[tuple[float, Found]]
) -> Iterator[Found]:
    """Gives what to time: what searches find under limits that fall, then their baselines, the closest first.

    Args:
        search: As above.
        budget: The limits of the first search.
        searches: What they found; filled here.
        timed: What was given before, with its time; filled by the caller.
    """
    limits = budget
    for _ in range(ROUNDS):
        try:
            found = search(limits)
        except BudgetError:
            if not searches:
                raise
            break
        searches.append(found)
        yield found
        took = next(took for took, other in timed if other.policy == found.policy)
        promised = min(found.costs.latency_ms or took, limits.latency_ms or took)
        limits = replace(limits, latency_ms=promised * (budget.latency_ms or took) / took)
    others = [
        replace(found, policy=one.policy, chosen=name, costs=one.costs)
        for found in searches
        for name, one in found.baselines.items()
    ]
    yield from sorted(others, key=lambda other: other.baselines[other.chosen].kl)
