"""The search against exhaustive search, on a score that is not additive."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from hq_plugin import Budget, Config, HybridPolicy
from hq_plugin.allocation import best_uniform
from hq_plugin.cost import CostTable
from hq_plugin.lasting import LastingLosses
from hq_plugin.search import additive_sensitivities, genetic_search
from hq_plugin.sites import find_sites
from hq_plugin.space import SearchSpace
from tests.conftest import TinyNet


def build(**options: object) -> tuple[SearchSpace, CostTable]:
    x = torch.randn(2, 1, 8, 8)
    space = SearchSpace.build(find_sites(TinyNet().eval(), lambda m: m(x), 2), Config(**options))  # type: ignore[arg-type]
    return space, CostTable(space)


def each(function: Callable[[HybridPolicy], float]) -> Callable[[Sequence[HybridPolicy]], list[float]]:
    return lambda policies: [function(policy) for policy in policies]


def interacting_one(policy: HybridPolicy) -> float:
    """Errors that add up, plus one that appears only when neighbours are both narrow."""
    widths = [bits.weight for bits in policy.values()]
    weights = (3.0, 1.0, 2.0, 4.0)
    alone = sum(w * 4.0**-b for w, b in zip(weights, widths, strict=True))
    together = sum(6.0 * 2.0 ** -(a + b) for a, b in itertools.pairwise(widths))
    return alone + together


interacting = each(interacting_one)


@pytest.mark.parametrize("bits", [3.2, 4.0, 5.5])
def test_finds_the_best_of_all_policies(bits: float) -> None:
    space, costs = build(weight_bits=(2, 3, 4, 5, 6, 8))
    resources = costs.resources(Budget(weight_bits=bits))
    everything = itertools.product(*(range(top + 1) for top in space.top[:, 0]))
    genomes = [np.stack([np.array(g), np.zeros(4, dtype=int)], 1) for g in everything]
    best = min(interacting_one(space.policy(g)) for g in genomes if resources[0].used(g) <= 1)
    config = Config(search_evaluations=120, seed=1)
    losses = LastingLosses(space, additive_sensitivities(space, interacting), 0)
    found = genetic_search(space, resources, losses, interacting, config, best_uniform(space, costs, resources))
    assert found.leaders[0].score == pytest.approx(best, rel=1e-9)


def test_no_candidate_ever_exceeds_the_budget_and_none_is_scored_twice() -> None:
    space, costs = build(activation_bits=(2, 4, 8))
    resources = costs.resources(Budget(weight_bits=5, bitops=2.4e6))
    seen: list[HybridPolicy] = []

    def score(policy: HybridPolicy) -> float:
        seen.append(policy)
        return interacting_one(policy)

    losses = LastingLosses(space, additive_sensitivities(space, interacting), 0)
    found = genetic_search(space, resources, losses, each(score), Config(search_evaluations=80), [])
    assert 5 < len(seen) == len(set(seen)) == len(found.evaluations) <= 80
    assert all(r.used(space.genome(policy)) <= 1 for policy in seen for r in resources)
    scores = [scored.score for scored in found.leaders]
    assert scores == sorted(scores)


def test_the_same_seed_searches_the_same_way() -> None:
    space, costs = build()
    resources = costs.resources(Budget(weight_bits=4))
    losses = LastingLosses(space, additive_sensitivities(space, interacting), 0)

    def log(seed: int) -> list[bytes]:
        config = Config(search_evaluations=60, seed=seed)
        found = genetic_search(space, resources, losses, interacting, config, [])
        return [scored.genome.tobytes() for scored in found.evaluations]

    assert log(0) == log(0)
    assert log(0) != log(1)


def test_not_finite_is_the_worst() -> None:
    space, costs = build()
    resources = costs.resources(Budget(weight_bits=4))
    losses = LastingLosses(space, additive_sensitivities(space, interacting), 0)

    def sometimes(policy: HybridPolicy) -> float:
        return float("nan") if policy["stem"].weight < 4 else interacting_one(policy)

    found = genetic_search(space, resources, losses, each(sometimes), Config(search_evaluations=60), [])
    assert np.isfinite(found.leaders[0].score)
    assert any(np.isinf(scored.score) for scored in found.evaluations)


def test_a_space_with_one_policy() -> None:
    space, costs = build(weight_bits=(4,))
    resources = costs.resources(Budget(weight_bits=5))
    losses = LastingLosses(space, additive_sensitivities(space, interacting), 0)
    found = genetic_search(space, resources, losses, interacting, Config(search_evaluations=20), [])
    assert len(found.evaluations) == 1


def test_sensitivities_by_hand() -> None:
    space, _ = build(weight_bits=(2, 8), activation_bits=(4, 8))
    table = additive_sensitivities(
        space, each(lambda policy: sum(10.0 / b.weight + (b.activation == 4) for b in policy.values()))
    )
    assert table.shape == (4, 2, 2)
    np.testing.assert_allclose(table[0], [[10 / 2 - 10 / 8 + 1, 10 / 2 - 10 / 8], [1, 0]])


def test_of_the_narrowest_width_alone_others_follow() -> None:
    space, _ = build(weight_bits=(2, 3, 4, 8), activation_bits=(4, 8))
    seen: list[HybridPolicy] = []

    def score(policy: HybridPolicy) -> float:
        seen.append(policy)
        return sum(16 * 0.25**b.weight + 0.25 * (b.activation == 4) for b in policy.values())

    table = additive_sensitivities(space, each(score), narrowest=True)
    assert len(seen) == 1 + 4 * 2, "the widest policy, and the narrowest weight and activation of each site"
    np.testing.assert_allclose(table, additive_sensitivities(space, each(score)), atol=1e-12)


def test_a_width_that_overflows_is_the_worst_and_nothing_more() -> None:
    space, _ = build(weight_bits=(2, 8))
    first = next(iter(space.policy(space.top)))

    def score(policy: HybridPolicy) -> float:
        return math.inf if policy[first].weight == 2 else sum(1.0 / b.weight for b in policy.values())

    table = additive_sensitivities(space, each(score))
    assert table[1:, 0, 0] == pytest.approx(1 / 2 - 1 / 8)
    assert table[0, 0, 0] == pytest.approx(10 * (1 / 2 - 1 / 8))
    assert table[0, 1, 0] == 0
