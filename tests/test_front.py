"""The convex front against exhaustive search, and against dynamic programming at each of its costs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hq_plugin.allocation import dynamic_programming, monotone
from hq_plugin.cost import CostTable, Resource
from hq_plugin.front import convex_front
from tests.test_allocation import every_genome, losses, space_of


@given(seed=st.integers(0, 10_000), activations=st.sampled_from([(8,), (4, 8)]))
@settings(max_examples=30, deadline=None)
def test_every_point_is_optimal_for_what_it_costs(seed: int, activations: tuple[int, ...]) -> None:
    space = space_of(weight_bits=(2, 3, 8), activation_bits=activations)
    costs = CostTable(space)
    table = losses(space, costs, seed)
    rows = np.arange(len(space.groups))

    def at(of: np.ndarray, genome: np.ndarray) -> float:
        return float(of[rows, genome[:, 0], genome[:, 1]].sum())

    front = convex_front(table, costs.weight_bytes, 1000)
    everyone = [(at(costs.weight_bytes, g), at(table, g)) for g in every_genome(space)]
    assert at(costs.weight_bytes, front[0]) == min(cost for cost, _ in everyone)
    assert at(table, front[-1]) == pytest.approx(min(loss for _, loss in everyone))
    for genome in front:
        cost, loss = at(costs.weight_bytes, genome), at(table, genome)
        assert loss <= min(other for c, other in everyone if c <= cost) + 1e-9
        planned = dynamic_programming(table, [Resource("weight_bits", costs.weight_bytes, cost)])
        assert at(table, planned) == pytest.approx(loss)


def test_points_are_spread_over_the_cost() -> None:
    rng = np.random.RandomState(0)
    cost = np.cumsum(rng.rand(100, 6, 1) + 0.1, axis=1)
    loss = monotone(rng.rand(100, 1, 1) * 4.0 ** -np.arange(6)[None, :, None])
    front = convex_front(loss, cost, 21)
    spent = np.array([cost[np.arange(100), g[:, 0], g[:, 1]].sum() for g in front])
    assert len(front) == 21
    assert np.allclose(np.diff(spent), np.diff(spent).mean(), rtol=0.3)
    assert (front[0] == 0).all()
    assert (front[-1][:, 0] == 5).all()


def test_without_a_choice_there_is_one_point() -> None:
    assert len(convex_front(np.zeros((3, 1, 1)), np.ones((3, 1, 1)), 20)) == 1
