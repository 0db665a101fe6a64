"""Allocation against exhaustive search: small spaces, in which every policy can be tried."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from hq_plugin import Budget, BudgetError, Config
from hq_plugin.allocation import FULL, Repair, best_uniform, dynamic_programming, monotone, undominated
from hq_plugin.cost import CostTable, Resource
from hq_plugin.sites import find_sites
from hq_plugin.space import SearchSpace
from tests.conftest import TinyNet


def space_of(model: nn.Module | None = None, **options: object) -> SearchSpace:
    model = model or TinyNet().eval()
    x = torch.randn(2, 1, 8, 8)
    return SearchSpace.build(find_sites(model, lambda m: m(x), 2), Config(**options))  # type: ignore[arg-type]


def every_genome(space: SearchSpace) -> list[np.ndarray]:
    places = [range(top + 1) for top in space.top.reshape(-1)]
    return [np.array(values).reshape(space.shape) for values in itertools.product(*places)]


def losses(space: SearchSpace, costs: CostTable, seed: int) -> np.ndarray:
    table = np.random.RandomState(seed).rand(*costs.weight_bytes.shape)
    return monotone(np.where(np.isfinite(costs.weight_bytes), table, np.inf))


@given(seed=st.integers(0, 10_000), bits=st.floats(2.8, 8.5))
@settings(max_examples=40, deadline=None)
def test_dynamic_programming_is_exact(seed: int, bits: float) -> None:
    space = space_of(weight_bits=(2, 3, 4, 8))
    costs = CostTable(space)
    resources = costs.resources(Budget(weight_bits=bits))
    table = losses(space, costs, seed)
    rows = np.arange(len(space.groups))

    def loss(genome: np.ndarray) -> float:
        return float(table[rows, genome[:, 0], genome[:, 1]].sum())

    allowed = [g for g in every_genome(space) if resources[0].used(g) <= 1]
    found = dynamic_programming(table, resources)
    assert resources[0].used(found) <= 1
    assert loss(found) == pytest.approx(min(map(loss, allowed)), abs=1e-9)


@given(seed=st.integers(0, 10_000), bits=st.floats(3.2, 8), bitops=st.floats(4e5, 3e6))
@settings(max_examples=40, deadline=None)
def test_two_limits_are_both_kept(seed: int, bits: float, bitops: float) -> None:
    space = space_of(weight_bits=(2, 4, 8), activation_bits=(2, 4, 8))
    costs = CostTable(space)
    resources = costs.resources(Budget(weight_bits=bits, bitops=bitops))
    found = dynamic_programming(losses(space, costs, seed), resources)
    assert all(resource.used(found) <= 1 for resource in resources)


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
        with pytest.raises(BudgetError, match="a and b at once"):
            dynamic_programming(table, resources)
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


def test_costs_by_hand() -> None:
    space = space_of(weight_bits=(2, 8), activation_bits=(4, 16))
    costs = CostTable(space)
    genome = np.array([[0, 0], [1, 1], [0, 1], [1, 0]])
    expected_weights = (72 // 8 * 2 + 8 + 1) + (72 // 8 * 8 + 8 + 1) + (128 // 8 * 2 + 16 + 1) + (640 + 10 + 1)
    total = costs.costs(genome)
    assert total.weight_bits == pytest.approx(expected_weights * 8 / 912)
    assert total.size == expected_weights + 2 * 8 + space.table.rest_bytes
    macs = [site.macs for site in space.table]
    assert total.bitops == macs[0] * 2 * 4 + macs[1] * 8 * 16 + macs[2] * 2 * 16 + macs[3] * 8 * 4


@pytest.mark.parametrize(
    ("budget", "says"),
    [("1bit", "effective bits"), ("500B", "stay float"), ("1%", "of the float model"), ("1kBitOps", "BitOps")],
)
def test_what_cannot_be_met_says_the_smallest_that_can(budget: str, says: str) -> None:
    costs = CostTable(space_of())
    with pytest.raises(BudgetError, match=says) as error:
        costs.resources(Budget.parse(budget))
    # The advice must be true: what it says can be asked for is accepted.
    advice = str(error.value).split("Ask for ")[1]
    text = advice.split('"')[1] if advice.startswith('"') else None
    offered = Budget.parse(text) if text else Budget(bitops=float(advice.split("bitops=")[1].split(")")[0]))
    costs.resources(offered)


def test_best_uniform() -> None:
    space = space_of(weight_bits=(2, 3, 4, 8))
    costs = CostTable(space)
    (genome,) = best_uniform(space, costs, costs.resources(Budget(weight_bits=3.9)))
    assert {bits.weight for bits in space.policy(genome).values()} == {3}
    both = space_of(weight_bits=(2, 4), activation_bits=(2, 4))
    table = CostTable(both)
    widest = table.costs(both.nearest_uniform(2, 4)).bitops
    found = best_uniform(both, table, table.resources(Budget(bitops=widest)))
    assert {str(next(iter(both.policy(g).values()))) for g in found} == {"W2A4", "W4A2"}


def test_monotone_removes_noise_but_keeps_order() -> None:
    table = np.array([[[5.0], [6.0], [1.0], [0.0]]])
    smooth = monotone(table)
    assert np.all(np.diff(smooth[0, :, 0]) < 0)
    assert smooth[0, 0, 0] == pytest.approx(6.0, rel=1e-4)
