import copy

import pytest
import torch
from torch import nn

from hq_plugin import Config, HybridPolicy, LayerBits, torch_ao
from hq_plugin.data import prepare_data
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
