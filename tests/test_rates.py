"""Learning rates: what peak each parameter has, and their course."""

import pytest
import torch
from torch import nn

from hq_plugin import Config, HybridPolicy, LayerBits, torch_ao
from hq_plugin.data import prepare_data
from hq_plugin.meta_training import build_network
from hq_plugin.rates import CHANNELS, MOST, STEPS, Rates, cosine, share_of_steps
from hq_plugin.sites import find_sites
from hq_plugin.space import SearchSpace


def test_the_rate_rises_and_falls() -> None:
    rates = [cosine(step, 100, 0.1) for step in range(100)]
    assert rates[0] < rates[4] == max(rates)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_fewer_steps_go_further_each() -> None:
    shares = [share_of_steps(steps) for steps in (1, 100, 200, STEPS, 10 * STEPS)]
    assert shares[0] == MOST
    assert shares[1] == pytest.approx((STEPS / 100) ** 0.5)
    assert shares == sorted(shares, reverse=True)
    assert shares[3:] == [1.0, 1.0]


def peaks(rates: Rates, network: nn.Module) -> dict[str, float]:
    """Returns the peak rate of each parameter, for steps of many samples."""
    names = {id(p): name for name, p in network.named_parameters()}
    return {names[id(p)]: group["lr"] for group in rates.groups(network, network, 128) for p in group["params"]}


def test_a_network_s_own_weights_may_learn_more_slowly(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(2, 1, 8, 8)
    data = prepare_data(batches, trained, Config(effort="smoke"))
    space = SearchSpace.build(find_sites(trained, lambda m: m(x), 2), Config())
    network = build_network(trained, space, data, Config(block="dense"))
    rates = peaks(Rates(1e-3, 5e-3, base=0.1), network)
    assert rates["stem.weight"] == rates["bn1.bias"] == pytest.approx(1e-4)
    assert rates["stem.weight_fake_quant.block.outer.weight"] == 1e-3
    assert rates["stem.weight_fake_quant.block.log_step"] == 5e-3
    assert len(rates) == len(list(network.parameters()))


def test_the_rate_of_a_wide_layer_falls_with_the_root_of_its_inputs() -> None:
    layers = {
        "narrow": nn.Linear(16, 5),
        "wide": nn.Linear(4 * CHANNELS, 5),
        "kernels": nn.Conv2d(16, 5, 7),  # many weights a channel, of few inputs
        "depthwise": nn.Conv2d(4 * CHANNELS, 4 * CHANNELS, 3, groups=4 * CHANNELS),
        "table": nn.Embedding(7, 4 * CHANNELS),  # whose rows are not summed over
    }
    for layer in layers.values():
        layer.weight.data /= layer.weight.data.square().mean().sqrt()  # type: ignore[operator]
    model = nn.ModuleDict({**layers, "computed": nn.utils.parametrizations.weight_norm(nn.Linear(3, 5))})
    rates = peaks(Rates(None, None), model)
    assert {name: rates[f"{name}.weight"] for name in layers} == pytest.approx(
        {"narrow": 0.01, "wide": 0.005, "kernels": 0.01, "depthwise": 0.01, "table": 0.01}
    )


def test_without_a_rate_each_weight_has_one_that_fits_its_size(tiny: nn.Module) -> None:
    with torch.no_grad():
        tiny.stem.weight.mul_(0.1 / tiny.stem.weight.square().mean().sqrt())
        tiny.head.weight.mul_(0.5 / tiny.head.weight.square().mean().sqrt())
        tiny.bn1.weight.fill_(1.0)
        tiny.bn1.bias.zero_()
    rates = peaks(Rates(None, 5e-3, base=0.5), tiny)
    assert rates["stem.weight"] == pytest.approx(0.5 * 1e-3)
    assert rates["head.weight"] == pytest.approx(0.5 * 5e-3)
    assert (rates["bn1.weight"], rates["bn1.bias"]) == (0.5 * 1e-3, 0.5 * 1e-4)


def test_a_complex_weight_has_a_rate_by_its_modulus() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(0.3j * torch.ones(4, 4))
    assert peaks(Rates(None, 5e-3), model)["weight"] == pytest.approx(0.01 * 0.3)


def test_the_rate_of_a_weight_falls_with_its_width(tiny: nn.Module) -> None:
    free = peaks(Rates(None, 5e-3), tiny)
    policy = HybridPolicy({"stem": LayerBits(2, 8), "head": LayerBits(4, 8)})
    fixed = peaks(Rates(None, 5e-3), torch_ao.prepare(tiny.eval(), policy))
    assert fixed["stem.weight"] == pytest.approx(free["stem.weight"])
    assert fixed["head.weight"] == pytest.approx(free["head.weight"] / 4)
    assert fixed["bn1.weight"] == free["bn1.weight"]


def test_rates_are_told_as_they_are() -> None:
    assert Rates(1e-3, None).told(2) == "0.001"
    assert Rates(None, None).told(128) == "0.01 of each weight's size"
    assert Rates(None, None).told(32) == "0.005 of each weight's size"
