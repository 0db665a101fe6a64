"""What rounding inputs costs to second order: that it is the distance, however a layer gets its input."""

import copy
import gc

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hq_plugin import Config
from hq_plugin.batch import Batch
from hq_plugin.data import prepare_data
from hq_plugin.distillation import kl_divergence
from hq_plugin.input_losses import input_losses
from hq_plugin.meta_training import build_network
from hq_plugin.sites import find_sites
from hq_plugin.space import SearchSpace

WIDTHS = (2, 3, 4, 6, 8)


class Branches(nn.Module):
    """Layers that share an input, one that gets it by name, and one whose input is changed in place after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.named, self.beside = nn.Linear(12, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.head = nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x)) + 0.1
        y = self.named(input=x) + self.beside(x)
        x += 1.0
        found: Tensor = self.head(torch.tanh(y * x))
        return found


@pytest.fixture
def setting() -> tuple[nn.Module, nn.Module, SearchSpace, list[Batch]]:
    torch.manual_seed(0)
    model = Branches().eval().requires_grad_(False)
    with torch.no_grad():
        model.head.weight.mul_(3)
    data = prepare_data([torch.randn(64, 12) for _ in range(10)], model, Config(effort="smoke"))
    sites = find_sites(model, data.holdout[0].run, 64)
    config = Config(weight_bits=(4, 8), activation_bits=WIDTHS, block="table", activation_scheme="static").filled()
    space = SearchSpace.build(sites, config)
    return (
        model,
        build_network(model, space, data, config),
        space,
        [Batch((torch.randn(256, 12),), {}, None, 256)] * 8,
    )


def test_the_estimate_is_the_distance(setting: tuple[nn.Module, nn.Module, SearchSpace, list[Batch]]) -> None:
    model, network, space, batches = setting
    estimated = input_losses(network, model, space, batches, 0)
    assert estimated.shape == (4, len(WIDTHS))
    (x,) = batches[0].args
    for row, group in enumerate(space.groups):
        for column, bits in enumerate(WIDTHS[:-1]):
            quantizer = copy.deepcopy(network.get_submodule(group.sites[0].name).activation_fake_quant)
            quantizer.bits = bits

            def rounded(module: nn.Module, args: tuple, kwargs: dict, quantizer=quantizer):  # type: ignore[no-untyped-def, type-arg]
                return tuple(map(quantizer, args)), {name: quantizer(value) for name, value in kwargs.items()}

            layer = model.get_submodule(group.sites[0].name)
            handle = layer.register_forward_pre_hook(rounded, with_kwargs=True)
            with torch.no_grad():
                changed = model(x)
            handle.remove()
            measured = float(kl_divergence(changed, model(x)))
            assert estimated[row, column] == pytest.approx(measured, rel=0.5), (group.name, bits)
    assert (np.diff(estimated, axis=1) < 0).all()
    assert (estimated[:, -1] == 0).all()


def test_rows_have_steps_of_their_own_where_they_are_dynamic(  # type: ignore[no-untyped-def]
    setting: tuple[nn.Module, nn.Module, SearchSpace, list[Batch]],
) -> None:
    model, _, _, batches = setting
    data = prepare_data([torch.randn(64, 12) for _ in range(10)], model, Config(effort="smoke"))
    sites = find_sites(model, data.holdout[0].run, 64)
    config = Config(weight_bits=(4, 8), activation_bits=(4, 16), activation_scheme="dynamic").filled()
    space = SearchSpace.build(sites, config)
    network = build_network(model, space, data, config)
    losses = input_losses(network, model, space, batches, 0)
    assert (losses[:, 0] > 0).all()
    assert (losses[:, 1] == 0).all()


def test_nothing_stays_behind(setting: tuple[nn.Module, nn.Module, SearchSpace, list[Batch]]) -> None:
    model, network, space, batches = setting
    before = copy.deepcopy(network.state_dict())
    widths = {name: module.bits for name, module in network.named_modules() if hasattr(module, "bits")}
    first, second = (input_losses(network, model, space, batches, 0) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert widths == {name: module.bits for name, module in network.named_modules() if hasattr(module, "bits")}
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_inputs_of_one_width_cost_nothing(setting: tuple[nn.Module, nn.Module, SearchSpace, list[Batch]]) -> None:
    model, network, space, batches = setting
    pinned = SearchSpace.build(space.table, Config(weight_bits=(4, 8), activation_bits=8).filled())
    np.testing.assert_array_equal(input_losses(network, model, pinned, batches, 0), np.zeros((4, 1)))


def test_inputs_are_not_kept(setting: tuple[nn.Module, nn.Module, SearchSpace, list[Batch]]) -> None:
    model, network, space, batches = setting

    def alive() -> int:
        input_losses(network, model, space, batches, 0)
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    assert alive() == alive()
