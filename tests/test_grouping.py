import numpy as np
import pytest
import torch
from torch import nn

from hq_plugin import Config, ConfigError
from hq_plugin.grouping import worthwhile_group_size
from hq_plugin.quantization import dequantize_weight as dequantize
from hq_plugin.quantization import optimal_weight_qparams, optimal_weight_step, quantize_weight, weight_rows
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


def test_large_weights_of_one_input_make_groups_worthwhile() -> None:
    sites, weights = table(nn.Sequential(linear(30.0)), torch.randn(2, 256))
    size = worthwhile_group_size(list(sites), weights)
    assert size in (32, 64, 128)
    # A whole bit less, more than the groups' steps take, and still closer than whole channels.
    assert error(weights["0"], size, 3) < error(weights["0"], 0, 4)


def test_ordinary_weights_keep_whole_channels() -> None:
    sites, weights = table(nn.Sequential(linear(1.0)), torch.randn(2, 256))
    assert worthwhile_group_size(list(sites), weights) == 0


def test_layers_without_groups_keep_whole_channels() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10), nn.Linear(10, 4))
    sites, weights = table(network, torch.randn(2, 3, 8, 8))
    assert [worthwhile_group_size([site], weights) for site in sites if site.name in ("0", "3")] == [0, 0]


def test_a_space_chooses_for_each_group_of_sites() -> None:
    network = nn.Sequential(linear(30.0), nn.Linear(96, 128), nn.Linear(128, 128))
    sites, weights = table(network, torch.randn(2, 256))
    space = SearchSpace.build(sites, Config(group_size="auto"), [("1", "2")], weights)
    policy = space.policy(space.top)
    assert policy["0"].group_size > 0
    assert policy["1"].group_size == policy["2"].group_size == 0
    assert np.array_equal(space.genome(policy), space.top)


def test_what_a_group_size_can_be() -> None:
    assert Config(group_size="auto").to_json()["group_size"] == "auto"
    with pytest.raises(ConfigError, match='group_size=-1 must be a whole number of at least 0 or "auto"'):
        Config(group_size=-1)
    with pytest.raises(ConfigError, match="group_size='some'"):
        Config(group_size="some")  # type: ignore[arg-type]
