"""A limit of latency is kept by what is found when it is run."""

import warnings
from collections.abc import Callable

import pytest
from torch import Tensor, nn

import hq_plugin as hq
from hq_plugin import Budget, BudgetError, HQWarning, HybridPolicy, LayerBits, profiling
from hq_plugin.found import Found
from hq_plugin.nn import packed_modules
from hq_plugin.result import Baseline, Costs
from hq_plugin.timed_search import search_and_time


def policy_of(bits: int) -> HybridPolicy:
    return HybridPolicy({"a": LayerBits(bits, 8)})


def found_of(bits: int, uniform: int) -> Found:
    """A search's result that promises a millisecond for each bit."""

    def baseline(name: str, width: int) -> Baseline:
        return Baseline(name, policy_of(width), Costs(width, 100, 1.0, latency_ms=float(width)), kl=1.0 / width)

    baselines = {"searched": baseline("searched", bits), "uniform": baseline("uniform", uniform)}
    return Found(policy_of(bits), "searched", baselines["searched"].costs, {}, baselines, [], {"search": 1.0})


class Machine:
    """Searches that find the widest policy under a limit, and a clock of which each policy has its own."""

    def __init__(self, clock: Callable[[int], float], uniform: int = 2) -> None:
        self.clock, self.uniform = clock, uniform
        self.limits: list[float] = []
        self.timed: list[int] = []

    def search(self, budget: Budget) -> Found:
        assert budget.latency_ms is not None
        self.limits.append(round(budget.latency_ms, 6))
        if budget.latency_ms < 2:
            raise BudgetError("the fastest takes 2 ms")
        return found_of(min(int(budget.latency_ms), 8), self.uniform)

    def milliseconds(self, policy: HybridPolicy) -> float:
        self.timed.append(policy["a"].weight)
        return self.clock(policy["a"].weight)

    def __call__(self, limit: float) -> Found:
        return search_and_time(self.search, self.milliseconds, Budget(latency_ms=limit))


def test_what_keeps_the_limit_is_taken_with_its_measured_time() -> None:
    machine = Machine(lambda bits: bits - 0.5)
    found = machine(6)
    assert (machine.limits, machine.timed) == ([6.0], [6])
    assert found.policy == policy_of(6)
    assert found.costs.latency_ms == found.baselines["searched"].costs.latency_ms == 5.5
    assert found.baselines["uniform"].costs.latency_ms == 2.0


def test_a_search_that_promised_too_much_is_repeated_under_a_lower_limit() -> None:
    machine = Machine(lambda bits: 1.5 * bits)
    found = machine(6)
    # 6 bits take 9 ms, so 4 are looked for, which take 6.
    assert (machine.limits, machine.timed) == ([6.0, 4.0], [6, 4])
    assert (found.policy, found.costs.latency_ms) == (policy_of(4), 6.0)
    assert found.seconds == {"search": 2.0}


def test_where_no_search_keeps_the_limit_a_baseline_does() -> None:
    machine = Machine(lambda bits: 3.0 if bits == 2 else 50.0)
    found = machine(6)
    assert machine.limits == [6.0, pytest.approx(0.72)]
    assert (found.policy, found.chosen, found.costs.latency_ms) == (policy_of(2), "uniform", 3.0)
    assert found.baselines["uniform"].costs.latency_ms == 3.0


def test_where_nothing_keeps_the_limit_the_fastest_is_taken_and_that_is_said() -> None:
    machine = Machine(lambda bits: 20.0 + bits)
    with pytest.warns(HQWarning, match=r"takes 22 ms, where 6 were asked for.*none of 2 .*\"22.4ms\""):
        found = machine(6)
    assert (found.policy, found.costs.latency_ms) == (policy_of(2), 22.0)


def test_a_disturbed_measurement_is_repeated() -> None:
    times = iter([6.3, 5.9])
    machine = Machine(lambda bits: next(times))
    assert machine(6).costs.latency_ms == 5.9
    assert (machine.limits, machine.timed) == ([6.0], [6, 6])


def test_a_budget_that_no_policy_keeps_by_the_profile() -> None:
    with pytest.raises(BudgetError, match="fastest takes 2 ms"):
        Machine(lambda bits: 1.0)(1)


def test_quantize_keeps_a_latency_that_layers_do_not_add_up_to(
    trained: nn.Module, batches: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def layer(layer: nn.Module, x: Tensor) -> dict[str, float]:
        return {"any": float(layer.bits.weight + layer.bits.activation)}  # type: ignore[union-attr]

    def model(model: nn.Module, batch: object) -> float:
        layers = packed_modules(model).values()
        total = float(sum(layer.bits.weight + layer.bits.activation for layer in layers))
        return total if len({layer.bits.activation for layer in layers}) == 1 else total + 40.0

    monkeypatch.setattr(profiling, "_timers", lambda *given: (layer, model))
    options = {"effort": "smoke", "progress": False, "weight_bits": (2, 4, 8), "activation_bits": (8, 16)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*took .*% more or less")
        small = hq.quantize(trained, "70ms", batches, target="torch", **options)
    result: hq.Result = small.hq  # type: ignore[assignment]
    assert result.costs.latency_ms == model(small, None) <= 70
    assert result.used == {"latency_ms": result.costs.latency_ms / 70}
    assert len({bits.activation for bits in result.policy.values()}) == 1
