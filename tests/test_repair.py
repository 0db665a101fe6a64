"""Repair of any genome into any limits."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hq_plugin import Budget, BudgetError
from hq_plugin.allocation import dynamic_programming
from hq_plugin.cost import CostTable, Resource
from hq_plugin.repair import FULL, Repair, undominated
from tests.test_allocation import every_genome, losses, space_of


@given(seed=st.integers(0, 10_000), bits=st.floats(2.8, 8))
@example(seed=0, bits=7.999999999999999)
@settings(max_examples=60, deadline=None)
def test_repair_never_exceeds_and_fills(seed: int, bits: float) -> None:
    space = space_of(weight_bits=(2, 3, 4, 5, 6, 8))
    costs = CostTable(space)
    resources = costs.resources(Budget(weight_bits=bits))
    rng = np.random.RandomState(seed)
    repair = Repair(losses(space, costs, seed), resources, space.top, rng)
    genome = repair(rng.randint(-1, 8, size=space.shape))
    assert resources[0].used(genome) <= 1
    possible = max(resources[0].used(g) for g in every_genome(space) if resources[0].used(g) <= 1)
    assert resources[0].used(genome) >= min(FULL, possible)


def limit(name: str, cost: np.ndarray, share: float) -> Resource:
    """A limit that lies between the cheapest and the dearest genome."""
    low, high = (float(part.sum()) for part in (cost.min(axis=(1, 2)), cost.max(axis=(1, 2))))
    return Resource(name, cost, low + share * (high - low))


@given(seed=st.integers(0, 10_000), share=st.floats(0, 1.1))
@settings(max_examples=60, deadline=None)
def test_a_narrower_width_may_cost_more(seed: int, share: float) -> None:
    space = space_of(weight_bits=(2, 4, 8), activation_bits=(8, 16))
    rng = np.random.RandomState(seed)
    table = losses(space, CostTable(space), seed)
    resource = limit("latency_ms", rng.rand(*table.shape), share)
    rows, genomes = np.arange(len(space.groups)), every_genome(space)
    loss = {g.tobytes(): float(table[rows, g[:, 0], g[:, 1]].sum()) for g in genomes}
    allowed = [g for g in genomes if resource.used(g) <= 1 + 1e-12]
    if not allowed:
        return
    best = min(loss[g.tobytes()] for g in allowed)
    # Costs are rounded up to 1 / BINS of the capacity.
    planned = dynamic_programming(table, [resource])
    tight = replace(resource, capacity=resource.capacity * (1 - 1e-3))
    near = [loss[g.tobytes()] for g in genomes if tight.used(g) <= 1]
    assert resource.used(planned) <= 1 + 1e-9
    assert best - 1e-9 <= loss[planned.tobytes()] <= (min(near) if near else np.inf) + 1e-9
    repair = Repair(table, [resource], space.top, rng)
    for start in (rng.randint(-1, 4, size=space.shape), planned, space.top):
        found = repair(start)
        assert resource.used(found) <= 1 + 1e-9
        # No width could be raised without paying for it.
        for row, (w, a) in enumerate(found):
            wider = resource.cost[row, w:, a:] <= resource.cost[row, w, a]
            assert wider.sum() == 1


@given(seed=st.integers(0, 10_000), shares=st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)))
@settings(max_examples=60, deadline=None)
def test_limits_that_pull_in_different_directions(seed: int, shares: tuple[float, float]) -> None:
    space = space_of(weight_bits=(2, 4, 8), activation_bits=(8, 16))
    rng = np.random.RandomState(seed)
    table = losses(space, CostTable(space), seed)
    resources = [limit(name, rng.rand(*table.shape), share) for name, share in zip("ab", shares, strict=True)]
    possible = any(all(r.used(g) <= 1 for r in resources) for g in every_genome(space))
    if not possible:
        with pytest.raises(BudgetError, match="a and b at once") as raised:
            dynamic_programming(table, resources)
        (name, factor), *_ = re.findall(r"(a|b) takes ([0-9.]+) times its limit", str(raised.value))
        assert float(factor) > 1
        # What the message says can be had.
        more = [replace(r, capacity=r.capacity * float(factor)) if r.name == name else r for r in resources]
        assert any(all(r.used(g) <= 1 for r in more) for g in every_genome(space))
        return
    try:
        planned = dynamic_programming(table, resources)
    except BudgetError:
        return  # prices do not find every policy; they say so
    repair = Repair(table, resources, space.top, rng)
    for genome in (planned, repair(space.top), repair(rng.randint(-1, 4, size=space.shape))):
        assert all(resource.used(genome) <= 1 + 1e-9 for resource in resources)


def test_costs_that_rise_with_each_width_are_left_alone() -> None:
    space = space_of(weight_bits=(2, 3, 4, 8), activation_bits=(4, 8))
    costs = CostTable(space)
    resources = costs.resources(Budget(weight_bits=4, bitops=1e7))
    for g, w, a in np.ndindex(costs.bitops.shape):
        assert tuple(undominated(resources)[g, w, a]) == (w, a)
