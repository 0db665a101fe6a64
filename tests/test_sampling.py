import numpy as np
import torch

from hq_plugin import Budget, Config
from hq_plugin.allocation import monotone
from hq_plugin.cost import CostTable, Table
from hq_plugin.sampling import SPREAD_BITS, PolicySampler
from hq_plugin.sites import find_sites
from hq_plugin.space import SearchSpace
from tests.conftest import TinyNet


def build(activation_bits: tuple[int, ...] = (4, 8)) -> tuple[SearchSpace, CostTable, Table]:
    x = torch.randn(2, 1, 8, 8)
    space = SearchSpace.build(
        find_sites(TinyNet().eval(), lambda m: m(x), 2), Config(activation_bits=activation_bits)
    )
    groups, weights, activations = len(space.groups), space.top[0, 0] + 1, space.top[:, 1].max() + 1
    # The first group is a hundred times as sensitive as the last.
    scale = np.geomspace(100, 1, groups)[:, None, None]
    losses = scale * (4.0 ** -np.arange(weights)[:, None] + 4.0 ** -np.arange(activations))
    return space, CostTable(space), monotone(losses)


def test_a_step_s_policy_follows_from_seed_and_step() -> None:
    space, costs, losses = build()
    one, same, other = (PolicySampler(space, costs, losses, seed) for seed in (1, 1, 2))
    assert [one(step) for step in range(50)] == [same(step) for step in range(50)]
    assert [one(step) for step in range(50)] != [other(step) for step in range(50)]
    assert one(7) == same(7)


def test_without_a_budget_the_stream_runs_along_the_front() -> None:
    space, costs, losses = build()
    sampler = PolicySampler(space, costs, losses, 0)
    drawn = [space.genome(sampler(step)) for step in range(400)]
    bits = [costs.costs(genome).weight_bits for genome in drawn]
    counts, _ = np.histogram(bits, bins=5, range=(min(bits), min(bits) + SPREAD_BITS))
    assert counts.min() > 20
    # Sensitive groups get more bits than those that are not.
    mean = np.mean(drawn, axis=0)
    assert mean[0, 0] > mean[-1, 0] + 0.5
    assert any((genome == space.top).all() for genome in drawn)
    assert any((genome == 0).all() for genome in drawn)
    # Uniform ones of the widths between are drawn more often than chance would: 30 groups rarely agree.
    between = [g for g in drawn if len(set(g[:, 0])) == 1 and 0 < g[0, 0] < space.top[0, 0]]
    assert len(between) > len(drawn) / 50
    # Where activations may choose, they do.
    assert 0.1 < mean[:, 1].mean() < 0.9


def test_a_budget_is_kept_and_used_by_every_policy() -> None:
    space, costs, losses = build()
    resources = costs.resources(Budget(weight_bits=4, bitops=20 * sum(site.macs for site in space.table)))
    sampler = PolicySampler(space, costs, losses, 0, resources)
    shares = np.array([[r.used(space.genome(sampler(step))) for r in resources] for step in range(200)])
    assert shares.max() <= 1
    assert shares.max(axis=1).min() >= 0.9
    assert len({sampler(step) for step in range(200)}) > 10


def test_a_space_without_a_choice_gives_its_one_policy() -> None:
    x = torch.randn(2, 1, 8, 8)
    space = SearchSpace.build(
        find_sites(TinyNet().eval(), lambda m: m(x), 2), Config(weight_bits=(3,), activation_bits=8)
    )
    losses = np.zeros((len(space.groups), 1, 1))
    sampler = PolicySampler(space, CostTable(space), losses, 0)
    assert {sampler(step) for step in range(20)} == {space.policy(space.top)}
