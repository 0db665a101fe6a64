"""Choosing widths under a budget without running the network: dynamic programming and the best uniform policy.

The inputs are additive losses and costs, one number for each choice at each group. The genetic search
starts from what is found here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hq_plugin.cost import CostTable, Resource, Table
from hq_plugin.errors import BudgetError
from hq_plugin.space import Genome, SearchSpace

#: Bins of the dynamic program. It is exact while the capacity, in units of the costs' greatest common
#: divisor, has no more; beyond, costs are rounded up to 1/BINS of the capacity.
BINS = 1 << 16


def dynamic_programming(loss: Table, resources: Sequence[Resource]) -> Genome:
    """Minimises an additive loss under the budget (a multiple-choice knapsack).

    With one resource the result is exact (see `BINS`). With several, the others enter as Lagrangian
    prices: the cheapest prices found by bisection under which the policy keeps every limit.

    Args:
        loss: `[groups, weight widths, activation widths]`, finite where the cost is.
        resources: The limits, each of which some genome meets.

    Returns:
        A genome that keeps every limit.

    Raises:
        BudgetError: Each limit can be kept, but no genome was found that keeps all.
    """
    first, others = resources[0], list(resources[1:])
    genome = _knapsack(loss, first)
    prices = np.zeros(len(others))
    for _ in range(4 * len(others)):
        over = [i for i, other in enumerate(others) if other.used(genome) > 1]
        if not over:
            return genome
        worst = max(over, key=lambda i: others[i].used(genome))
        low, high = prices[worst], max(prices[worst], 1e-12)
        scaled = [_finite(other.cost) / max(other.capacity, 1e-12) for other in others]
        for _ in range(60):
            prices[worst] = high
            genome = _knapsack(loss + sum(p * c for p, c in zip(prices, scaled, strict=True)), first)
            if others[worst].used(genome) <= 1:
                break
            low, high = high, high * 4
        for _ in range(24):
            middle = math.sqrt(max(low, 1e-12) * high)
            prices[worst] = middle
            trial = _knapsack(loss + sum(p * c for p, c in zip(prices, scaled, strict=True)), first)
            if others[worst].used(trial) <= 1:
                genome, high = trial, middle
            else:
                low = middle
        prices[worst] = high
    exceeded = [resource for resource in resources if resource.used(genome) > 1]
    if exceeded:
        names = " and ".join(resource.name for resource in resources)
        # Rounded up, so that asking for as much works.
        found = [f"{r.name} takes {math.ceil(1000 * r.used(genome)) / 1000:.3f} times its limit" for r in exceeded]
        raise BudgetError(
            f"No policy was found that keeps {names} at once: where the others are kept, {' and '.join(found)}. "
            "Ask for that much of it, or for more of the others."
        )
    return genome


def _finite(cost: Table) -> Table:
    return np.where(np.isfinite(cost), cost, 0.0)


def _knapsack(loss: Table, resource: Resource) -> Genome:
    """Exact multiple-choice knapsack over integer units of one resource."""
    groups, _, activations = loss.shape
    cost = resource.cost.reshape(groups, -1)
    value = np.where(np.isfinite(cost), loss.reshape(groups, -1), np.inf)
    least = cost.min(axis=1, keepdims=True)
    extra = np.where(np.isfinite(cost), cost - least, np.inf)
    room = resource.capacity - float(least.sum())
    finite = extra[np.isfinite(extra)]
    whole = finite[finite > 0].astype(np.int64)
    unit = float(np.gcd.reduce(whole)) if whole.size and np.all(whole == finite[finite > 0]) else 0.0
    if unit == 0.0 or room / unit > BINS:
        unit = max(room / BINS, 1e-12)
    bins = int(room / unit + 1e-9)
    # A limit that is a hair below a whole number of units would be exceeded by that hair.
    bins -= bins > 0 and float(least.sum()) + bins * unit > resource.capacity
    bins = min(bins, int(finite.max(initial=0.0) * groups / unit) + 1)
    units = np.where(np.isfinite(extra), np.ceil(extra / unit - 1e-9), bins + 1).astype(np.int64)

    best, updated, moved = np.zeros(bins + 1), np.empty(bins + 1), np.empty(bins + 1)
    better = np.empty(bins + 1, dtype=bool)
    choice = np.zeros((groups, bins + 1), dtype=np.int16)
    for g in range(groups):
        updated.fill(np.inf)
        for k in np.flatnonzero(units[g] <= bins):
            there, length = slice(units[g, k], None), bins + 1 - units[g, k]
            np.add(best[:length], value[g, k], out=moved[:length])
            np.less(moved[:length], updated[there], out=better[:length])
            np.copyto(updated[there], moved[:length], where=better[:length])
            np.copyto(choice[g, there], np.int16(k), where=better[:length])
        best, updated = updated, best
    genome = np.zeros((groups, 2), dtype=np.int64)
    at: int = bins
    for g in reversed(range(groups)):
        chosen: int = choice[g, at].item()
        genome[g] = divmod(chosen, activations)
        at -= units[g, chosen].item()
    return genome


def best_uniform(space: SearchSpace, costs: CostTable, resources: Sequence[Resource]) -> list[Genome]:
    """Returns the uniform genomes inside the budget that no other one of them exceeds in both widths.

    With activations of one width that is one genome: the largest weight width that fits. It is empty if
    not even the smallest uniform genome fits (pinned sites may be the reason).
    """
    fitting: list[tuple[int, int, Genome]] = []
    for weight in space.weight_bits:
        for activation in space.activation_bits:
            genome = space.nearest_uniform(weight, activation)
            if all(resource.used(genome) <= 1 for resource in resources):
                fitting.append((weight, activation, genome))
    return [
        genome
        for weight, activation, genome in fitting
        if not any(w >= weight and a >= activation and (w, a) != (weight, activation) for w, a, _ in fitting)
    ]


def monotone(loss: Table) -> Table:
    """Makes losses fall strictly with each width, as they would without noise, so that bits get used."""
    result = np.where(np.isfinite(loss), loss, -np.inf)
    for axis in (1, 2):
        result = np.flip(np.maximum.accumulate(np.flip(result, axis), axis), axis)
    # Of each group's own: one that is huge must not make the falls of all others larger than their losses.
    scale = np.maximum(result.max(axis=(1, 2), initial=0.0, keepdims=True), 1e-9) * 1e-6
    fall = np.add.outer(np.arange(loss.shape[1]), np.arange(loss.shape[2])) * scale
    return np.where(np.isfinite(loss), np.maximum(result, 0.0) - fall, np.inf)
