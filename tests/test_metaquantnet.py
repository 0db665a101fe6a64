import pytest
import torch
from torch import nn

from hq_plugin import Config
from hq_plugin.metaquantnet import ActivationSteps, MetaQuantNet
from hq_plugin.sites import find_sites
from hq_plugin.space import SearchSpace


def test_activation_steps() -> None:
    steps = ActivationSteps((4, 8, 16))
    assert steps.widths == (4, 8)
    steps.initialise({4: (0.5, 3.0), 8: (0.03, 40.0)})
    step, zero = steps.qparams(8)
    assert (step.item(), zero.item()) == pytest.approx((0.03, 40.0))
    assert bool(steps.calibrated)
    x = torch.tensor([-10.0, 0.0, 0.6, 100.0])
    assert steps(x, 4).tolist() == [-1.5, 0.0, 0.5, 6.0]


def test_it_generates_the_weights_of_a_policy(tiny: nn.Module) -> None:
    x = torch.randn(2, 1, 8, 8)
    table = find_sites(tiny, lambda m: m(x), 2)
    config = Config(dense_limit=100)
    space = SearchSpace.build(table, config)
    weights = {site.name: tiny.get_submodule(site.name).weight for site in table}
    meta = MetaQuantNet(space, weights, config)
    kinds = [type(meta.block(site.name)).__name__ for site in table]
    assert kinds == ["DenseBlock", "DenseBlock", "LowRankBlock", "LowRankBlock"]
    generated = meta(space.policy(space.top * 0), weights)
    assert {name: len(w.unique()) <= 4 * len(w) for name, w in generated.items()} == dict.fromkeys(generated, True)
