from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import hq_plugin
from hq_plugin import Config, ConfigError, HybridPolicy, PolicyError
from hq_plugin.grouping import worthwhile_group_sizes
from hq_plugin.nn import packed_modules
from hq_plugin.optimal_qparams import optimal_weight_qparams, optimal_weight_step
from hq_plugin.quantization import dequantize_weight as dequantize
from hq_plugin.quantization import quantize_weight, weight_rows
from hq_plugin.sites import SiteTable, find_sites
from hq_plugin.space import SearchSpace


def table(network: nn.Module, x: torch.Tensor) -> tuple[SiteTable, dict[str, torch.Tensor]]:
    sites = find_sites(network, lambda m: m(x), len(x))
    return sites, {site.name: network.get_submodule(site.name).weight for site in sites}


def linear(outlier: float) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(256, 96, bias=False)
    with torch.no_grad():
        layer.weight.normal_()
        layer.weight[:, 7] *= outlier
    return layer


def error(weight: torch.Tensor, size: int, bits: int) -> float:
    rows = weight_rows(weight.detach(), size)
    if size:
        step, zero = optimal_weight_qparams(rows, bits)
    else:
        step, zero = optimal_weight_step(rows, bits), None
    return float((dequantize(quantize_weight(rows, step, bits, zero), step, bits, zero) - rows).square().sum())


SIZES = (0, 32, 64, 128)


def test_large_weights_of_one_input_make_groups_worthwhile() -> None:
    sites, weights = table(nn.Sequential(linear(30.0)), torch.randn(2, 256))
    (size,) = worthwhile_group_sizes(list(sites), weights, (4,), SIZES)
    assert size in (32, 64, 128)
    # A whole bit less, more than the groups' steps take, and still closer than whole channels.
    assert error(weights["0"], size, 3) < error(weights["0"], 0, 4)


def test_ordinary_weights_keep_whole_channels_at_low_widths() -> None:
    layer = linear(1.0)
    with torch.no_grad():
        layer.weight.copy_(torch.distributions.Laplace(0.0, 1.0).sample(layer.weight.shape))
    sites, weights = table(nn.Sequential(layer), torch.randn(2, 256))
    widths = (1, 2, 3, 6, 8)
    sizes = worthwhile_group_sizes(list(sites), weights, widths, SIZES)
    assert sizes[:2] == (0, 0)
    assert sizes[3] == sizes[4] > 0
    assert worthwhile_group_sizes(list(sites), weights, widths, (64,)) == (64,) * 5
    assert worthwhile_group_sizes(list(sites), weights, widths, (48, 0)) == (0,) * 5  # 48 does not divide 256


def test_layers_without_groups_keep_whole_channels() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10), nn.Linear(10, 4))
    sites, weights = table(network, torch.randn(2, 3, 8, 8))
    for site in sites:
        if site.name in ("0", "3"):
            assert worthwhile_group_sizes([site], weights, (2, 8), SIZES) == (0, 0)


def test_a_space_chooses_for_each_group_of_sites_and_width() -> None:
    network = nn.Sequential(linear(30.0), nn.Linear(96, 128), nn.Linear(128, 128))
    sites, weights = table(network, torch.randn(2, 256))
    config = Config(group_size=SIZES, weight_bits=(2, 4))
    space = SearchSpace.build(sites, config, [("1", "2")], weights)
    low, high = space.policy(space.top * 0), space.policy(space.top)
    assert high["0"].group_size > 0
    assert low["1"].group_size == low["2"].group_size == 0
    assert high["1"].group_size == high["2"].group_size
    for policy, genome in ((low, space.top * 0), (high, space.top)):
        assert np.array_equal(space.genome(policy), genome)
    other = HybridPolicy({name: replace(bits, group_size=16) for name, bits in high.items()})
    with pytest.raises(PolicyError, match=r"a group size of 16; this search space has \d+ at 4 bits"):
        space.genome(other)


def test_a_network_has_the_group_size_of_the_width_in_force() -> None:
    """Prepared, trained and packed, with whole channels at one width and groups at another."""
    torch.manual_seed(0)
    network = nn.Sequential(linear(30.0), nn.ReLU(), nn.Linear(96, 4)).eval()
    config = Config(
        effort="smoke", group_size=SIZES, weight_bits=(2, 4), activation_bits=(8,), pinned={"2": 4}, progress=False
    )
    session = hq_plugin.meta_train(network, [torch.randn(16, 256) for _ in range(8)], config=config)
    for width in (0, 1):
        policy = session.space.policy(session.space.top * 0 + [[width, 0], [0, 0]])
        packed = session.finetune(policy, steps=1)
        layer = packed_modules(packed)["0"]
        size = policy["0"].group_size
        assert layer.bits.group_size == size
        assert len(layer.weight_step) == 1 + (96 * 256 // size if size else 96)
        # The packed model is what was trained, and its bytes are those of the cost table.
        assert packed.hq.size == sum(t.numel() * t.element_size() for t in packed.state_dict().values())
    assert session.space.policy(session.space.top)["0"].group_size > 0


def test_what_a_group_size_can_be() -> None:
    assert Config(group_size=[0, 64]).group_size == (0, 64)  # type: ignore[arg-type]
    for wrong in (-1, (), (0, -64), ("some",), "some"):
        with pytest.raises(ConfigError, match="group_size="):
            Config(group_size=wrong)  # type: ignore[arg-type]
