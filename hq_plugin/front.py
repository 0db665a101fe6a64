"""The front of additive losses over one cost: every policy that is optimal for what it costs, at once.

For reports and for choosing a budget by hand. Which policy a budget gets is `allocation.py` and `search.py`.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from hq_plugin.cost import Table
from hq_plugin.space import Genome


def convex_front(loss: Table, cost: Table, points: int) -> list[Genome]:
    """Returns policies along the front of additive losses over one cost, from the cheapest to the closest.

    Each is optimal for what it costs: they are the solutions of the knapsack for every Lagrangian price, which
    one sort of all steps along the groups' lower convex hulls gives (Kellerer et al., Knapsack Problems, 11.2).

    Args:
        loss: `[groups, weight widths, activation widths]`, finite where the cost is.
        cost: The cost, of the same shape.
        points: How many to return at most, evenly spaced in cost; the first and the last are among them.
    """
    groups, _, activations = loss.shape
    genome = np.zeros((groups, 2), dtype=np.int64)
    steps: list[tuple[float, float, int, int]] = []
    for g in range(groups):
        hull = _lower_hull(cost[g].reshape(-1), loss[g].reshape(-1))
        genome[g] = divmod(hull[0][2], activations)
        for (x, y, _), (next_x, next_y, choice) in itertools.pairwise(hull):
            steps.append(((next_y - y) / (next_x - x), next_x - x, g, choice))
    steps.sort(key=lambda step: step[0])
    total = sum(step[1] for step in steps)
    front, spent = [genome.copy()], 0.0
    for _, extra, g, choice in steps:
        genome[g] = divmod(choice, activations)
        spent += extra
        if spent >= total * len(front) / max(points - 1, 1) * (1 - 1e-12):
            front.append(genome.copy())
    return front


def _lower_hull(cost: NDArray, loss: NDArray) -> list[tuple[float, float, int]]:
    """Returns the choices on the lower convex hull that a higher cost brings closer: cost, loss and index."""
    order = np.lexsort((loss, cost))
    hull: list[tuple[float, float, int]] = []
    for x, y, index in ((float(cost[i]), float(loss[i]), int(i)) for i in order if np.isfinite(cost[i])):
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (x0, y0, _), (x1, y1, _) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y, index))
    return hull
