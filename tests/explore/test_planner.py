import itertools

import numpy as np
import pytest

from hq_plugin.allocation import monotone
from hq_plugin.errors import BudgetError, ConfigError
from hq_plugin.explore import Planner


def test_a_plan_is_the_best_of_all_policies_under_the_limit(planner: Planner) -> None:
    losses, table = monotone(planner.outline.sensitivities), planner.space
    choices = [range(count) for count in table.top[:, 0] + 1]
    most = table.top[:, 1]

    def loss(genome: np.ndarray) -> float:
        return float(losses[np.arange(4), genome[:, 0], genome[:, 1]].sum())

    every = [np.stack([np.array(weights), most], axis=1) for weights in itertools.product(*choices)]
    for limit in (3.0, 4.0, 5.5):
        plan = planner.plan("weight_bits", limit, {})
        assert plan.costs["weight_bits"] <= limit
        within = [genome for genome in every if planner.predict(genome).costs["weight_bits"] <= limit]
        assert loss(plan.genome) <= min(map(loss, within)) + 1e-9
        # By the page's own number as well.
        assert plan.predicted <= min(planner.predict(genome).predicted for genome in within) + 1e-9


@pytest.mark.parametrize("axis", ["weight_bits", "size", "bitops", "energy_uj"])
def test_the_front_goes_from_the_cheapest_to_the_closest_and_plans_reach_it(planner: Planner, axis: str) -> None:
    front = planner.front(axis, {})
    costs = [point.costs[axis] for point in front]
    assert costs == sorted(costs)
    assert front[-1].predicted <= front[0].predicted
    assert all(planner.plan(axis, cost, {}).costs[axis] <= cost * (1 + 1e-6) for cost in costs[::5])


def test_pins_hold_at_every_limit(planner: Planner) -> None:
    pins = {"head": (8, None), "stem": (2, 4)}
    for point in [*planner.front("weight_bits", pins), planner.plan("weight_bits", 7.0, pins)]:
        policy = planner.space.policy(point.genome)
        assert policy["head"].weight == 8
        assert (policy["stem"].weight, policy["stem"].activation) == (2, 4)


def test_what_is_impossible_is_said(planner: Planner) -> None:
    with pytest.raises(BudgetError, match="the smallest has"):
        planner.plan("weight_bits", 3.0, {"head": (8, None)})
    with pytest.raises(ConfigError, match="no group 'tail'"):
        planner.plan("weight_bits", 3.0, {"tail": (8, None)})
    with pytest.raises(ConfigError, match="cannot have 7 bits"):
        planner.plan("weight_bits", 5.0, {"head": (7, None)})
    with pytest.raises(ConfigError, match="no cost 'latency_ms'"):
        planner.plan("latency_ms", 3.0, {})


def test_predictions_are_those_of_the_session(planner: Planner) -> None:
    genome, _ = planner.outline.scored[0]
    prediction = planner.predict(genome)
    rows = np.arange(len(genome))
    assert prediction.predicted == pytest.approx(
        max(monotone(planner.outline.sensitivities)[rows, genome[:, 0], genome[:, 1]].sum(), 0)
    )
    assert prediction.costs["size"] == planner.costs.costs(genome).size
