"""What torch's exporter does not translate, and what stands for it."""

from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn
from torch.nn import functional as F

import hq_plugin as hq
from hq_plugin import ExportError, LayerBits
from hq_plugin.integrations.onnxruntime import rewrites
from hq_plugin.integrations.onnxruntime.graph import is_whole
from hq_plugin.integrations.onnxruntime.rewrites import Rewritten
from tests.integrations.onnxruntime.test_export import error, packed


class OneHeadOfKeys(nn.Module):
    """Multi-query attention, as Falcon has it."""

    def forward(self, x: Tensor) -> Tensor:
        query = x.view(*x.shape[:-1], 4, 8).transpose(1, 2)
        one = query[:, :1]
        mask = torch.zeros(x.shape[0], 1, x.shape[1], x.shape[1], dtype=x.dtype)
        return F.scaled_dot_product_attention(query, one, one, mask).transpose(1, 2).flatten(2)


class Windows(nn.Module):
    """Attention in windows, as Hiera has it: one dimension more."""

    def forward(self, x: Tensor) -> Tensor:
        query = x.view(x.shape[0], 2, 3, 4, 8).transpose(2, 3)
        return F.scaled_dot_product_attention(query, query * 2, query).transpose(2, 3).reshape(x.shape)


class Turned(nn.Module):
    """Rotary positions by complex numbers, as DeepSeek-V2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.linspace(0, 3, 6 * 16).view(6, 16))

    def forward(self, x: Tensor) -> Tensor:
        turns = torch.polar(torch.ones_like(self.angles), self.angles)
        pairs = torch.view_as_complex(x.view(x.shape[0], 1, 6, 16, 2))
        return torch.view_as_real(pairs * turns.unsqueeze(0).unsqueeze(-3)).reshape(x.shape)


class Inverse(nn.Module):
    """A quantile of the normal distribution, as Gemma 3n has it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.erfinv(torch.tanh(x)) * (1 + torch.distributions.Normal(0, 1).icdf(torch.tensor(0.95)))


class Biased(nn.Module):
    """A product in bfloat16, as Falcon's positions are."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.linspace(0, 1, 32).bfloat16() * torch.arange(32)


class Checked(nn.Module):
    """A check of its own inputs, as LLaVA has it."""

    def forward(self, x: Tensor) -> Tensor:
        torch._check_tensor_all((x * x) >= 0)
        return x * 2


KINDS = [OneHeadOfKeys, Windows, Turned, Inverse, Checked]


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_translated_is_said_anew(
    kind: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), kind(), nn.Linear(32, 5)).eval()
    x = torch.randn(3, 6, 32)
    small = packed(model, {"0": LayerBits(4, 16), "2": LayerBits(8, 16)}, x)
    hq.export(small, tmp_path / "m.onnx", x, accuracy_level=1)
    assert error(tmp_path / "m.onnx", small, torch.randn(5, 6, 32)) < 1e-5
    monkeypatch.setattr(rewrites, "_REWRITES", {})
    with pytest.raises(ExportError, match="cannot be exported"):
        hq.export(small, tmp_path / "again.onnx", x)


def test_products_in_bfloat16_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32), Biased(), nn.Linear(32, 5)).eval(), torch.randn(3, 6, 32)
    small = packed(model, {"0": LayerBits(4, 16), "2": LayerBits(8, 16)}, x)
    hq.export(small, tmp_path / "m.onnx", x, accuracy_level=1)
    assert error(tmp_path / "m.onnx", small, x) < 5e-3  # the product itself is not rounded to bfloat16


@pytest.mark.parametrize(
    ("query", "key", "mask", "grouped"),
    [
        ((2, 4, 5, 8), (2, 4, 6, 8), None, False),
        ((2, 4, 5, 8), (2, 2, 6, 8), (2, 1, 5, 6), True),
        ((2, 4, 5, 8), (2, 1, 6, 8), (5, 6), False),
        ((2, 3, 4, 5, 8), (2, 3, 4, 6, 8), (2, 1, 1, 5, 6), False),
        ((2, 3, 4, 5, 8), (2, 3, 2, 6, 8), None, True),
        ((2, 5, 8), (2, 6, 8), (2, 5, 6), False),
    ],
)
def test_attention_is_what_it_was(
    query: tuple[int, ...], key: tuple[int, ...], mask: tuple[int, ...] | None, grouped: bool
) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(query), torch.randn(key), torch.randn(key)
    m = None if mask is None else torch.randn(mask)
    with Rewritten():
        found = F.scaled_dot_product_attention(q, k, v, m, enable_gqa=grouped)
    assert torch.allclose(found, F.scaled_dot_product_attention(q, k, v, m, enable_gqa=grouped), atol=1e-6)


def test_the_inverse_of_the_error_function_is_exact_in_single_precision() -> None:
    x = torch.cat([torch.linspace(-0.999999, 0.999999, 4001), torch.tensor([0.0])])
    with Rewritten():
        found = torch.erfinv(x)
    assert torch.allclose(found, torch.erfinv(x), rtol=2e-6, atol=1e-7)


def test_a_graph_that_lacks_a_tensor_is_not_whole() -> None:
    nodes = [helper.make_node("Clip", ["x", "low", ""], ["y"])]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    low = helper.make_tensor("low", onnx.TensorProto.FLOAT, [], [0.0])
    assert is_whole(helper.make_model(helper.make_graph(nodes, "g", [x], [y], [low])))
    assert not is_whole(helper.make_model(helper.make_graph(nodes, "g", [x], [y])))
