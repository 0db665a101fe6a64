import numpy as np
import torch

from hq_plugin import Budget, Config
from hq_plugin.cost import CostTable
from hq_plugin.sampling import FOCUS, PolicySampler
from hq_plugin.sites import find_sites
from hq_plugin.space import SearchSpace
from tests.conftest import TinyNet


def build() -> tuple[SearchSpace, CostTable]:
    x = torch.randn(2, 1, 8, 8)
    config = Config(activation_bits=(4, 8))
    space = SearchSpace.build(find_sites(TinyNet().eval(), lambda m: m(x), 2), config)
    return space, CostTable(space)


def test_a_step_s_policy_follows_from_seed_and_step() -> None:
    space, costs = build()
    one, same, other = (PolicySampler(space, costs, seed) for seed in (1, 1, 2))
    assert [one(step) for step in range(50)] == [same(step) for step in range(50)]
    assert [one(step) for step in range(50)] != [other(step) for step in range(50)]
    assert one(7) == same(7)


def test_extremes_and_uniform_policies_are_sampled_too() -> None:
    space, costs = build()
    sampler = PolicySampler(space, costs, 0)
    drawn = [sampler(step) for step in range(400)]
    assert space.policy(space.top) in drawn
    assert space.policy(np.zeros_like(space.top)) in drawn
    uniform = [p for p in drawn if len({bits.weight for bits in p.values()}) == 1]
    assert 40 < len(uniform) < 200


def test_the_whole_range_of_sizes_is_covered() -> None:
    space, costs = build()
    sampler = PolicySampler(space, costs, 0)
    bits = [costs.costs(space.genome(sampler(step))).weight_bits for step in range(300)]
    counts, _ = np.histogram(bits, bins=6, range=(min(bits), min(bits) + 2.5))
    assert counts.min() > 10


def test_a_budget_draws_policies_around_it() -> None:
    space, costs = build()
    (resource,) = costs.resources(Budget(weight_bits=4))
    sampler = PolicySampler(space, costs, 0, [resource])
    shares = np.array([resource.used(space.genome(sampler(step))) for step in range(200)])
    near = (shares > FOCUS[0] - 0.15) & (shares < FOCUS[1] + 0.15)
    assert near.mean() > 0.65
