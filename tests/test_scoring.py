import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from hq_plugin import Config, DataError, HQWarning, HybridPolicy, LayerBits, torch_ao
from hq_plugin.data import Data, prepare_data
from hq_plugin.distillation import loss_function
from hq_plugin.scoring import Scorer, calibrate_activations, evaluating
from tests.conftest import SITES


@pytest.fixture
def scorer(trained: nn.Module, batches) -> Scorer:  # type: ignore[no-untyped-def]
    data = prepare_data(batches, trained, Config(effort="smoke", holdout=64))
    return Scorer(trained, data, loss_function("auto", torch.randn(2, 10)), 64, 32)


def prepared(model: nn.Module, bits: LayerBits, scorer: Scorer) -> nn.Module:
    network = torch_ao.prepare(model, HybridPolicy(dict.fromkeys(SITES, bits)))
    calibrate_activations(network, scorer._data, 2, torch.device("cpu"))
    return network


def test_recalibration_helps_low_bit_weights(trained: nn.Module, scorer: Scorer) -> None:
    network = prepared(trained, LayerBits(2, 8), scorer)
    stale = scorer.measure(network).distance
    fresh = scorer.score(network, HybridPolicy(dict.fromkeys(SITES, LayerBits(2, 8)))).distance
    assert fresh < stale


def test_the_samples_of_a_recalibration(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    data = prepare_data(batches, trained, Config(effort="smoke", holdout=64))
    scorer = Scorer(trained, data, loss_function("auto", torch.randn(2, 10)), 64, 32)
    assert [batch.size for batch in scorer._first(32)] == [32]
    assert [batch.size for batch in scorer._first(100)] == [64, 36]
    assert [batch.size for batch in scorer._first(65)] == [64]
    assert sum(batch.size for batch in scorer._first(10**6)) == sum(batch.size for batch in data.train)


def test_eight_bits_are_almost_float(trained: nn.Module, scorer: Scorer) -> None:
    fidelity = scorer.measure(prepared(trained, LayerBits(8, 8), scorer))
    assert fidelity.distance < 1e-3
    assert fidelity.agreement is not None
    assert fidelity.agreement > 0.99


def test_fewer_samples_when_asked(scorer: Scorer, trained: nn.Module) -> None:
    calls = []
    trained_copy = copy.deepcopy(trained)
    trained_copy.register_forward_hook(lambda *_: calls.append(1))
    scorer.measure(trained_copy, samples=64)
    assert len(calls) == 1
    scorer.measure(trained_copy)
    assert len(calls) == 1 + len(scorer.batches)


def teacher_runs(teacher: nn.Module, data: Data) -> list[int]:
    """How often a teacher has run after each of: some samples measured, all, all again, and all once forgotten."""
    runs: list[int] = []
    counts = []
    teacher.register_forward_hook(lambda *_: runs.append(1))
    student = copy.deepcopy(teacher)
    student._forward_hooks.clear()
    scorer = Scorer(teacher, data, loss_function("mse", torch.randn(2, 10)), 64, 32)
    before = scorer.measure(student, samples=64).distance
    for samples in (64, None, None):
        scorer.measure(student, samples=samples)
        counts.append(len(runs))
    scorer.forget_targets()
    assert scorer.measure(student, samples=64).distance == before
    return [*counts, len(runs)]


def test_the_teacher_runs_once_where_its_outputs_are_small(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    data = prepare_data(batches, trained, Config(effort="smoke", holdout=256))
    held = len(data.holdout)
    assert held > 1
    assert teacher_runs(copy.deepcopy(trained), data) == [1, held, held, held]


def test_large_outputs_are_kept_for_the_samples_of_a_candidate_until_they_are_forgotten(batches) -> None:  # type: ignore[no-untyped-def]
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 256)).eval()
    data = prepare_data(batches, teacher, Config(effort="smoke", holdout=256))
    held = len(data.holdout)
    assert teacher_runs(teacher, data) == [1, held, 2 * held - 1, 2 * held]


def test_evaluating_caches_weights_and_restores_statistics(trained: nn.Module, scorer: Scorer) -> None:
    policy = HybridPolicy(dict.fromkeys(SITES, LayerBits(3, 8)))
    network = prepared(trained, LayerBits(3, 8), scorer)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    plain = scorer.score(network, policy).distance
    network.load_state_dict(before)
    with evaluating(network):
        assert scorer.score(network, policy).distance == plain
        assert network.stem.weight is network.stem.weight
    assert network.stem.weight is not network.stem.weight
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


class Hungry(nn.Module):
    """Asks torch's allocator for more than there is, where a batch has more than so many samples."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model, self.most, self.seen = model, most, [0]

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            torch.empty(1 << 60)
        self.seen.append(len(x))
        return self.model(x)


def test_too_little_memory_halves_the_batch_and_changes_nothing(trained: nn.Module, scorer: Scorer) -> None:
    network = prepared(trained, LayerBits(3, 8), scorer)
    plain = scorer.measure(network)
    hungry = Hungry(network, 20)
    with pytest.warns(HQWarning, match="Memory is too little to score a batch of 64") as said:
        halved = scorer.measure(hungry)
    assert len(said) == 1, "said once"
    assert max(hungry.seen) == 16
    assert halved.distance == pytest.approx(plain.distance, rel=1e-5)
    assert halved.agreement == plain.agreement
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scorer.measure(Hungry(network, 16)).distance == halved.distance, "and stays so"


def test_one_sample_that_is_too_large_is_an_error(scorer: Scorer, trained: nn.Module) -> None:
    with pytest.warns(HQWarning), pytest.raises(RuntimeError, match="allocate memory"):
        scorer.measure(Hungry(trained, 0))


def test_other_errors_are_not_taken_for_it(scorer: Scorer) -> None:
    with pytest.raises(DataError, match="cannot run"):
        scorer.measure(nn.Linear(3, 3))


def test_an_output_that_is_a_mapping_is_joined(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = trained

        def forward(self, x: Tensor) -> dict[str, object]:
            return {"logits": self.inner(x), "hidden": (x, x.mean()), "length": 3}

    model = Named()
    data = prepare_data(batches, model, Config(effort="smoke", holdout=64))
    scorer = Scorer(model, data, loss_function("auto", model(batches[0][0])), 64, 32)
    plain = scorer.measure(model).distance
    with pytest.warns(HQWarning):
        assert scorer.measure(Hungry(model, 30)).distance == pytest.approx(plain, abs=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_distance_that_is_not_finite_is_the_worst(scorer: Scorer, trained: nn.Module, value: float) -> None:
    broken = copy.deepcopy(trained)
    with torch.no_grad():
        broken.head.bias[0] = value
    assert scorer.measure(broken).distance == float("inf")
    mean = Scorer(trained, scorer._data, lambda student, teacher: torch.tensor(value), 64, 32).measure(trained)
    assert mean.distance == float("inf")


def test_scoring_leaves_the_inputs_of_layers_that_calibration_did_not_reach_as_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    network = torch_ao.prepare(model, HybridPolicy({"0": LayerBits(4, 8), "1": LayerBits(4, 8)})).eval()
    network[0](torch.randn(16, 8))  # type: ignore[operator]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for _ in range(2):
        with evaluating(network) as scored, torch.no_grad():
            scored(torch.randn(16, 8))
            assert all(bool(v) for name, v in scored.state_dict().items() if name.endswith("calibrated"))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
