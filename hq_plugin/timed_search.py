"""A limit of latency that is kept by measurement, and not by prediction alone.

A profile adds up the times of layers; a runtime fuses them, or converts between them, and the sum is off. So what a
search found is timed whole. Where it takes too long, the search is repeated under a limit that is lower by as much;
where that does not help, a baseline that keeps the limit is taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
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
    times: dict[HybridPolicy, float] = {}

    def timed(found: Found) -> float:
        if found.policy not in times:
            took = milliseconds(found.policy)
            if limit < took <= _PERHAPS_NOISE * limit:
                took = min(took, milliseconds(found.policy))
            times[found.policy] = took
        return times[found.policy]

    searches = [search(budget)]
    while timed(searches[-1]) > limit and len(searches) < ROUNDS:
        lower = limit * (searches[-1].costs.latency_ms or limit) / timed(searches[-1])
        try:
            searches.append(search(replace(budget, latency_ms=lower)))
        except BudgetError:
            break
    tried = list(searches)
    if timed(tried[-1]) > limit:
        for other in _baselines(searches):
            tried.append(other)
            if timed(other) <= limit:
                break
    fastest = min(tried, key=timed)
    took = timed(fastest)
    if took > limit:
        warnings.warn(
            f"The model takes {took:.3g} ms, where {limit:.3g} were asked for: the times of its layers do not add "
            f"up to its own, and none of {len(times)} policies that should have kept the limit did. Ask for "
            f'"{1.02 * took:.3g}ms", or give one width for inputs, such as activation_bits=8.',
            HQWarning,
            stacklevel=2,
        )
    costs = replace(fastest.costs, latency_ms=took)
    chosen = replace(fastest.baselines[fastest.chosen], costs=costs)
    return replace(
        fastest,
        costs=costs,
        baselines={**fastest.baselines, fastest.chosen: chosen},
        seconds={name: sum(found.seconds[name] for found in searches) for name in fastest.seconds},
    )


def _baselines(searches: Sequence[Found]) -> list[Found]:
    """Returns the baselines of searches as if they had been chosen, the closest to the float model first."""
    found = [
        replace(search, policy=baseline.policy, chosen=name, costs=baseline.costs)
        for search in searches
        for name, baseline in search.baselines.items()
    ]
    return sorted(found, key=lambda one: one.baselines[one.chosen].kl)
