import pytest
import torch
from torch import Tensor, nn

from hq_plugin import ConfigError, ModelError
from hq_plugin.sites import find_sites
from tests.conftest import SITES, TinyNet


def sites_of(model: nn.Module, x: Tensor, **options: object):  # type: ignore[no-untyped-def]
    return find_sites(model, lambda m: m(x), x.shape[0], **options)  # type: ignore[arg-type]


def test_finds_every_kind_and_counts_exactly(tiny: nn.Module) -> None:
    table = sites_of(tiny, torch.randn(2, 1, 8, 8))
    assert [site.name for site in table] == SITES
    assert [site.kind for site in table] == ["conv2d", "conv2d", "conv2d", "linear"]
    # Output elements times the size of a dot product, by hand.
    assert [site.macs for site in table] == [8 * 64 * 9, 8 * 64 * 9, 16 * 64 * 8, 10 * 64]
    assert [site.input_numel for site in table] == [64, 8 * 64, 8 * 64, 64]
    assert table.weights == 72 + 72 + 128 + 640
    assert {layer.name for layer in table.float_layers} == {"bn1", "bn2"}


def test_bytes_are_exact(tiny: nn.Module) -> None:
    table = sites_of(tiny, torch.randn(2, 1, 8, 8))
    state = tiny.state_dict()
    assert table.float_bytes == sum(t.numel() * t.element_size() for t in state.values())
    # Two biases, and scale and shift of each folded BatchNorm.
    assert table.rest_bytes == 4 * (16 + 10 + 2 * 8 + 2 * 8)


def test_the_model_is_left_as_it_was(tiny: nn.Module) -> None:
    tiny.train()
    before = {name: t.clone() for name, t in tiny.state_dict().items()}
    sites_of(tiny, torch.randn(2, 1, 8, 8))
    assert tiny.training
    assert all(torch.equal(before[name], t) for name, t in tiny.state_dict().items())
    assert not any(module._forward_hooks for module in tiny.modules())


def test_embedding_and_conv1d() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv = nn.Embedding(50, 8), nn.Conv1d(8, 4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.conv(self.embed(ids).mT).mean(-1)

    table = sites_of(Text(), torch.zeros(3, 10, dtype=torch.long))
    assert [(s.kind, s.macs, s.quantizes_input) for s in table] == [
        ("embedding", 0, False),
        ("conv1d", 4 * 8 * 24, True),
    ]


def test_a_layer_that_only_holds_a_weight_for_others_is_a_site() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.head, self.idle = (
                nn.Embedding(20, 8),
                nn.Linear(8, 20, bias=False),
                nn.Embedding(9, 4),
            )
            self.embed = nn.Embedding(20, 8)
            self.embed.weight = self.head.weight = self.shared.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    table = sites_of(Shared(), torch.zeros(3, 10, dtype=torch.long))
    assert {(site.name, site.owner, site.macs > 0) for site in table} == {
        ("shared", "shared", False),
        ("head", "shared", True),
        ("embed", "shared", False),
    }
    assert [layer.name for layer in table.float_layers] == ["idle"]


def test_tied_weights_count_once_and_share_a_group() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    table = sites_of(Tied(), torch.zeros(2, 3, dtype=torch.long))
    assert table.weights == 400
    assert [site.group for site in table] == ["embed", "embed"]
    assert table.float_bytes == 1600


def test_a_duplicate_reference_is_one_site() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    table = sites_of(Twice(), torch.randn(2, 4))
    assert [(site.name, site.macs) for site in table] == [("a", 32)]


def test_a_weight_that_is_read_is_a_site_without_an_input_and_an_unused_one_says_why() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.used(x), self.read.weight)

    table = sites_of(Bypass(), torch.randn(2, 4))
    assert [(site.name, site.macs, site.quantizes_input) for site in table] == [
        ("used", 16, True),
        ("read", 16, False),
    ]
    reasons = {layer.name: layer.reason for layer in table.float_layers}
    assert "never used" in reasons["unused"]


def test_weights_shared_with_something_else_stay_float() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.raw = self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) @ self.raw

    table = sites_of(Shared(), torch.randn(2, 4))
    assert [site.name for site in table] == ["a"]
    assert "tied to" in next(layer for layer in table.float_layers if layer.name == "b").reason


def test_parametrized_layers_stay_float() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    table = sites_of(model, torch.randn(2, 4))
    assert [site.name for site in table] == ["0"]
    assert any("parametrized" in layer.reason for layer in table.float_layers)


def test_exclude(tiny: nn.Module) -> None:
    table = sites_of(tiny, torch.randn(2, 1, 8, 8), exclude=("*wise",))
    assert [site.name for site in table] == ["stem", "head"]
    with pytest.raises(ConfigError, match="matches no module"):
        sites_of(tiny, torch.randn(2, 1, 8, 8), exclude=("nothing*",))


@pytest.mark.parametrize(
    "model", [nn.ReLU(), nn.Sequential(nn.LayerNorm(4)), nn.ConvTranspose2d(1, 1, 1), nn.BatchNorm2d(1)]
)
def test_nothing_to_quantize(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="nothing to quantize"):
        sites_of(model, torch.randn(2, 1, 4, 4))


def test_lazy_parameters_are_named() -> None:
    with pytest.raises(ModelError, match="uninitialised"):
        sites_of(nn.Sequential(nn.LazyLinear(3)), torch.randn(2, 4))


def test_the_model_itself_may_be_a_site() -> None:
    assert [site.name for site in sites_of(nn.Linear(4, 3), torch.randn(2, 4))] == [""]


def test_tiny_net_is_used_by_name() -> None:
    assert TinyNet().stem.weight.shape == (8, 1, 3, 3)
