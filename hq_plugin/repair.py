"""Mutation and repair: what the search changes about a policy, and what moves the result back inside the budget.

`Repair` moves any genome inside the limits and fills it up; `moved` is the mutation that comes before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hq_plugin.allocation import dynamic_programming
from hq_plugin.cost import Resource, Table
from hq_plugin.errors import BudgetError
from hq_plugin.space import Genome

#: Share of the budget below which a repaired policy is filled up by exchanging widths between groups.
FULL = 0.97

#: Standard deviation of the logarithm of the noise in repair: without it every policy would be repaired
#: towards the dynamic program's, and the search could not learn where additive losses are wrong.
NOISE = 1.0


def moved(genome: Genome, top: Genome, rng: np.random.RandomState) -> Genome:
    """Moves a heavy-tailed number of widths, mostly by one: the mutation of the "fast" GA.

    Doerr et al., arXiv:1703.03334: a power law over the number of moved genes, mostly one or two,
    sometimes half of them. The result may lie outside the space and the budget; `Repair` follows.
    """
    free = np.argwhere(top > 0)
    genome = genome.copy()
    if len(free) == 0:
        return genome
    limit = max(1, len(free) // 2)
    weights = np.arange(1, limit + 1) ** -1.5
    count = rng.choice(limit, p=weights / weights.sum()) + 1
    for row, column in free[rng.choice(len(free), size=count, replace=False)]:
        genome[row, column] += (1 if rng.rand() < 0.8 else 2) * (1 if rng.rand() < 0.5 else -1)
    return genome


class Repair:
    """Moves any genome inside the budget, and uses up what is left of it.

    While a limit is broken, the step down that costs the least loss for what it saves is taken; then,
    while one fits, the step up that gains the most loss for what it costs. Both are drawn with a little
    noise, so that two different genomes are not always repaired in the same way.

    A choice that costs no less than a wider one is never worth taking (a layer may be faster on a float input
    than on one that must be quantized first): it counts as that wider one, and becomes it in the end.

    Args:
        loss: Additive losses, as for `dynamic_programming`.
        resources: The limits.
        top: The largest genome of the space.
        rng: Source of the noise.
        noise: Standard deviation of the logarithm of the noise.
    """

    def __init__(
        self,
        loss: Table,
        resources: Sequence[Resource],
        top: Genome,
        rng: np.random.RandomState,
        *,
        noise: float = NOISE,
    ) -> None:
        self.top, self.rng, self.noise = top, rng, noise
        self._rows = np.arange(len(top))
        self._wider = undominated(resources)
        at = (self._rows[:, None, None], self._wider[..., 0], self._wider[..., 1])
        self.loss = loss[at]
        self.resources = [replace(resource, cost=resource.cost[at]) for resource in resources]
        self._columns = [column for column in (0, 1) if top[:, column].any()]

    def __call__(self, genome: Genome) -> Genome:
        """Returns a repaired copy: never over a limit, and full (97 %) wherever the space allows it."""
        noise = np.exp(self.rng.normal(0, self.noise, size=genome.shape))
        return self._widened(self._filled(np.clip(genome, 0, self.top), noise))

    def _widened(self, genome: Genome) -> Genome:
        widened: Genome = self._wider[self._rows, genome[:, 0], genome[:, 1]]
        return widened

    def _filled(self, genome: Genome, noise: NDArray) -> Genome:
        genome = self._fit(genome, noise)
        if self._usage(genome) >= FULL or self._usage(self.fullest) < FULL:
            return genome
        for _ in range(2 * len(genome)):
            exchanged = self._exchange(genome, noise)
            if self._usage(exchanged) > self._usage(genome):
                genome = exchanged
            if self._usage(genome) >= FULL:
                return genome
        return self.fullest.copy()

    @cached_property
    def planned(self) -> Genome:
        """The genome of the least additive loss."""
        return dynamic_programming(self.loss, self.resources)

    @cached_property
    def fullest(self) -> Genome:
        """The genome that uses most of the budget, whatever it loses."""
        resource = max(self.resources, key=lambda r: r.spent(self.top) / max(r.capacity, 1e-12))
        cost = np.where(np.isfinite(resource.cost), -resource.cost, np.inf)
        try:
            return dynamic_programming(cost, [resource, *(r for r in self.resources if r is not resource)])
        except BudgetError:  # under several limits at once it may find none where there is one
            return self.planned

    def _usage(self, genome: Genome) -> float:
        return max(resource.used(genome) for resource in self.resources)

    def _fit(self, genome: Genome, noise: NDArray) -> Genome:
        # Where each step down saves of every resource, there are no more steps than this.
        for _ in range(int(self.top.sum()) + 1):
            if all(resource.used(genome) <= 1 for resource in self.resources):
                return self._fill(genome, noise)
            lower = self._step_down(genome, noise)
            if lower is None:
                break
            genome = lower
        return self._fill(self.planned.copy(), noise)

    def _at(self, table: Table, genome: Genome) -> NDArray[np.float64]:
        values: NDArray[np.float64] = table[self._rows, genome[:, 0], genome[:, 1]]
        return values

    def _changes(self, genome: Genome, column: int, step: int) -> tuple[NDArray, NDArray, NDArray]:
        """Returns, for a step of each group in one column: possible, change of loss, changes of cost."""
        moved = genome.copy()
        moved[:, column] += step
        possible = (moved[:, column] >= 0) & (moved[:, column] <= self.top[:, column])
        moved = np.clip(moved, 0, self.top)
        loss = self._at(self.loss, moved) - self._at(self.loss, genome)
        cost = np.stack(
            [(self._at(r.cost, moved) - self._at(r.cost, genome)) / max(r.capacity, 1e-12) for r in self.resources]
        )
        return possible, loss, cost

    def _step_down(self, genome: Genome, noise: NDArray) -> Genome | None:
        broken = np.array([resource.used(genome) > 1 for resource in self.resources])
        best, place = np.inf, None
        for column in self._columns:
            possible, loss, cost = self._changes(genome, column, -1)
            saved = -cost[broken].sum(axis=0)
            # A step that saves nothing is the last resort: the one after it may.
            score = np.where(
                possible & (saved >= 0),
                np.maximum(loss, 1e-12) * noise[:, column] / np.maximum(saved, 1e-15),
                np.inf,
            )
            row = int(score.argmin())
            if score[row] < best:
                best, place = score[row], (row, column)
        if place is None:  # of two resources, each step may cost of one what it saves of the other
            return None
        genome = genome.copy()
        genome[place] -= 1
        return genome

    def _fill(self, genome: Genome, noise: NDArray) -> Genome:
        while True:
            room = np.array([(r.capacity - r.spent(genome)) / max(r.capacity, 1e-12) for r in self.resources])
            best, place = -np.inf, None
            for column in self._columns:
                possible, loss, cost = self._changes(genome, column, 1)
                fits = possible & np.all(cost <= room[:, None], axis=0)
                gain = np.maximum(-loss, 1e-12) * noise[:, column] / np.maximum(cost.max(axis=0), 1e-15)
                score = np.where(fits, gain, -np.inf)
                row = int(score.argmax())
                if score[row] > best:
                    best, place = score[row], (row, column)
            if place is None:
                return genome
            genome = genome.copy()
            genome[place] += 1

    def _exchange(self, genome: Genome, noise: NDArray) -> Genome:
        """Moves one width at random, up or down, and lets the others make up for it."""
        moves = [
            (row, column, step)
            for (row, column), index in np.ndenumerate(genome)
            for step in (-1, 1)
            if 0 <= index + step <= self.top[row, column]
        ]
        if not moves:
            return genome
        row, column, step = moves[self.rng.randint(len(moves))]
        exchanged, noise = genome.copy(), noise.copy()
        exchanged[row, column] += step
        # The width just moved is the last to be moved back.
        noise[row, column] *= 1e9 if step > 0 else 1e-9
        return self._fit(exchanged, noise)


def undominated(resources: Sequence[Resource]) -> NDArray[np.int64]:
    """Returns, for each choice, the widest that costs no more of any resource and is as wide in both widths.

    Returns:
        Indices `[groups, weight widths, activation widths, 2]`.
    """
    costs = np.stack([resource.cost for resource in resources])
    _, groups, weights, activations = costs.shape
    found = np.empty((groups, weights, activations, 2), dtype=np.int64)
    for w, a in np.ndindex(weights, activations):
        wider = costs[:, :, w:, a:]
        allowed = np.all(wider <= costs[:, :, w, a, None, None], axis=0) & np.isfinite(wider[0])
        allowed[:, 0, 0] = True
        # Of those allowed, the one of the largest indices, weights first.
        last = allowed.shape[1] * allowed.shape[2] - 1 - allowed.reshape(groups, -1)[:, ::-1].argmax(axis=1)
        found[:, w, a, 0], found[:, w, a, 1] = np.divmod(last, allowed.shape[2]) + np.array([[w], [a]])
    return found
