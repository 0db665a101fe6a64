"""Allocation against exhaustive search: small spaces, in which every policy can be tried."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hq_plugin import Budget, BudgetError, Config
from hq_plugin.allocation import best_uniform, dynamic_programming, monotone
from hq_plugin.cost import CostTable
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


def test_one_huge_loss_leaves_the_others_theirs() -> None:
    loss = np.stack([np.array([[0.02 * 0.25**k] for k in range(6)])] * 4)
    expected = monotone(loss)[1:]
    loss[0, 0] = 1e6
    np.testing.assert_array_equal(monotone(loss)[1:], expected)
    np.testing.assert_allclose(expected, loss[1:], atol=1e-6)
