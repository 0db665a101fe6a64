import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hq_plugin
from hq_plugin import HybridPolicy, LayerBits, torch_ao
from hq_plugin.nn import HeldWeight, PackedModule, with_held_weights
from hq_plugin.rewriting import hold_parameters
from hq_plugin.sites import find_sites


class Experts(nn.Module):
    """Two products by 3-D parameters, one of them transposed, and a parameter that is only added."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 24, 16) / 4)
        self.down = nn.Parameter(torch.randn(3, 24, 16) / 5)
        self.position = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        hidden = nn.functional.linear(x + self.position[0], self.up[expert]).relu()
        return hidden @ self.down[expert]


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.experts, self.head = nn.Linear(16, 16), Experts(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.head(sum(self.experts(x, torch.tensor(index)) for index in range(3)))  # type: ignore[arg-type]


@pytest.fixture
def mixture() -> Mixture:
    torch.manual_seed(0)
    return Mixture().eval()


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def test_parameters_that_multiply_are_held_and_nothing_else(mixture: Mixture) -> None:
    held = hold_parameters(mixture, lambda m: m(X))
    layers = {name for name, module in held.named_modules() if isinstance(module, HeldWeight)}
    assert layers == {"experts.held.up", "experts.held.down"}
    assert torch.equal(held(X), mixture(X))
    assert isinstance(held.experts, Experts)
    assert type(held.experts).__name__ == "Experts"
    assert not any(isinstance(module, HeldWeight) for module in mixture.modules())
    table = find_sites(held, lambda m: m(X), 8)
    site = table["experts.held.down"]
    assert (site.weight_shape, site.macs, site.quantizes_input) == ((72, 16), 3 * 24 * 16, False)


def test_a_single_expert_is_held_like_several_are() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(1, 24, 16) / 4)
            self.row = nn.Parameter(torch.randn(1, 1, 512))
            self.place = nn.Parameter(torch.randn(1, 8, 16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm((x + self.place), self.up.transpose(1, 2)) + self.row.mean()

    torch.manual_seed(0)
    held = hold_parameters(Shared(), lambda m: m(X[None]))
    assert {name for name, module in held.named_modules() if isinstance(module, HeldWeight)} == {"held.up"}


def test_a_held_weight_survives_copies_and_moves(mixture: Mixture) -> None:
    held = copy.deepcopy(hold_parameters(mixture, lambda m: m(X))).double()
    assert held.experts.up.dtype == torch.float64
    assert torch.equal(held.experts.up, mixture.experts.up.double())
    held.experts.held["up"].weight.data.zero_()
    assert not held.experts.up.any()
    assert mixture.experts.up.any()


def test_converted_equals_prepared_and_a_loaded_one_the_saved(mixture: Mixture, tmp_path: Path) -> None:
    names = ["inner", "experts.held.up", "experts.held.down", "head"]
    policy = HybridPolicy({name: LayerBits(bits, 16) for name, bits in zip(names, (4, 3, 2, 8), strict=True)})
    prepared = torch_ao.prepare(mixture, policy).eval()
    packed = torch_ao.convert(prepared)
    assert isinstance(packed.experts.held["up"], PackedModule)
    assert torch.equal(packed(X), prepared(X))
    assert not torch.equal(packed(X), mixture(X))
    hq_plugin.save(packed, tmp_path / "saved")
    assert torch.equal(hq_plugin.load(tmp_path / "saved", Mixture())(X), packed(X))


def test_training_reaches_a_held_weight(mixture: Mixture) -> None:
    packed = hq_plugin.quantize(mixture, "5bit", [X], effort="smoke", progress=False, pinned={"experts.*": 3})
    assert packed.hq.policy["experts.held.up"].weight == 3  # type: ignore[union-attr]
    assert torch.isfinite(packed(X)).all()


def test_a_session_with_held_weights_is_saved_and_loaded(mixture: Mixture, tmp_path: Path) -> None:
    session = hq_plugin.meta_train(mixture, [X], effort="smoke", progress=False)
    session.save(tmp_path / "session")
    loaded = hq_plugin.load_session(tmp_path / "session", mixture, [X])
    assert loaded.search("5bit").policy == session.search("5bit").policy


def test_names_that_are_nothing_to_hold_are_passed_over(mixture: Mixture) -> None:
    assert with_held_weights(mixture, ["inner", "experts.held.nothing", "nowhere.held.up"]) is mixture


@pytest.mark.parametrize("fast_path", [True, False])
def test_attention_and_encoder_layers_whose_weights_are_read(fast_path: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(6 * 32, 4)).eval()
    x = torch.randn(4, 6, 32)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        packed = hq_plugin.quantize(model, "4bit", [x], effort="smoke", progress=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    policy = packed.hq.policy  # type: ignore[union-attr]
    for index in range(2):
        for name in ("self_attn.held.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"):
            assert f"0.layers.{index}.{name}" in policy
    error = (packed(x) - model(x)).norm() / model(x).norm()
    assert error < 0.6


def test_modules_that_hold_weights_are_pickled(mixture: Mixture) -> None:
    holding = with_held_weights(mixture, ["experts.held.up"])
    assert "experts.held.up" in dict(holding.named_modules())
    again = pickle.loads(pickle.dumps(holding.experts))
    assert torch.equal(again(X, torch.tensor(1)), mixture.experts(X, torch.tensor(1)))
