import copy
import importlib
import sys

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor, quantize_
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import hq_plugin as hq
from hq_plugin import EngineError, HybridPolicy, LayerBits, ModelError, PolicyError, torch_ao
from hq_plugin.integrations.torchao import HybridQuantizer, to_torchao, torchao_config
from tests.integrations.huggingface.conftest import SMOKE, TEXTS, llama, tokenizer

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def packed(net: nn.Module, bits: dict[str, LayerBits]) -> nn.Module:
    prepared = torch_ao.prepare(net, HybridPolicy(bits)).eval()
    with torch.no_grad():
        prepared(X)
    return torch_ao.convert(prepared)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [0, 32])
def test_tensors_have_equal_values(net: nn.Module, bits: int, group: int) -> None:
    small = packed(net, {"first": LayerBits(bits, 16, group), "head": LayerBits(4, 16)})
    made = to_torchao(small)
    assert isinstance(made.first.weight, IntxUnpackedToInt8Tensor)
    torch.testing.assert_close(made.first.weight.dequantize(), small.first.weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made(X), small(X), rtol=1e-4, atol=1e-5)
    assert type(made.second) is nn.Linear


def test_a_transformers_model_says_how_it_is_saved() -> None:
    options = {"activation_bits": 16, "processor": tokenizer(), "sequence_length": 16}
    made = to_torchao(hq.quantize(llama(), "4.6bit", TEXTS, config=SMOKE, **options))
    with pytest.raises(ModelError, match="Save the packed model"):
        made.save_pretrained("anywhere")


def test_layers_with_quantized_inputs_stay_packed(net: nn.Module) -> None:
    small = packed(net, {"first": LayerBits(4, 8), "head": LayerBits(4, 16)})
    made = to_torchao(small)
    assert type(made.first) is type(small.first)
    torch.testing.assert_close(made(X), small(X), rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="activation_bits=16"):
        to_torchao(packed(net, {"first": LayerBits(4, 8)}))


def test_inputs_with_a_step_a_token(net: nn.Module) -> None:
    bits = {"first": LayerBits(4, 8, 32, True), "second": LayerBits(3, 8, dynamic=True), "head": LayerBits(4, 16)}
    small = packed(net, bits)
    made = to_torchao(small)
    assert isinstance(made.first.weight, IntxUnpackedToInt8Tensor)
    assert isinstance(made.second.weight, IntxUnpackedToInt8Tensor)
    # Values that lie between two integers may be rounded to the other one.
    torch.testing.assert_close(made(X), small(X), rtol=0.02, atol=0.02)
    with pytest.raises(PolicyError, match="PT2E cannot"):
        HybridQuantizer(HybridPolicy(bits)).annotate(torch.export.export(net, (X,)).module())  # type: ignore[arg-type]


def test_a_language_model_with_tied_weights() -> None:
    torch.manual_seed(0)
    small = hq.quantize(llama(), "5bit", TEXTS, config=SMOKE, processor=tokenizer(), sequence_length=16)
    made = to_torchao(small)
    assert made.lm_head.weight is made.model.embed_tokens.weight
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(made(ids).logits, small(ids).logits, rtol=1e-3, atol=1e-4)


def test_a_policy_is_torchao_s_configuration(net: nn.Module) -> None:
    policy = HybridPolicy({"first": LayerBits(3, 16, 32), "second": LayerBits(5, 16)})
    model = copy.deepcopy(net)
    quantize_(model, torchao_config(policy), filter_fn=None)
    assert model.first.weight.target_dtype == torch.int3
    assert model.first.weight.block_size == (1, 32)
    assert model.second.weight.target_dtype == torch.int5
    assert type(model.head.weight) is nn.Parameter
    assert int(model.first.weight.qdata.max()) <= 3
    assert float((model(X) - net(X)).norm() / net(X).norm()) < 0.5


@pytest.mark.parametrize(
    ("bits", "says"),
    [
        ({"words": LayerBits(0)}, r"leaves out \(0 bits\): words\..*embedding_bits without 0"),
        (
            {"words.parts.0": LayerBits(4), "first": LayerBits(4)},
            r"split embedding: words\.parts\.0\..*embedding_parts=1",
        ),
        (
            {"words.parts.0.0": LayerBits(4), "words.parts.0.1": LayerBits(0), "words.basis": LayerBits(4)},
            r"split embedding: words\.parts\.0\.0, words\.parts\.0\.1, words\.basis\..*embedding_columns=1",
        ),
    ],
)
def test_a_policy_that_torchao_s_configuration_cannot_say(bits: dict[str, LayerBits], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        torchao_config(HybridPolicy(bits))


def test_the_quantizer_knows_padding_by_name() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"), nn.Flatten(2), nn.Conv1d(4, 4, 3, padding="same")
    ).eval()
    exported = torch.export.export(net, (torch.randn(2, 3, 8, 8),)).module()
    policy = HybridPolicy({"0": LayerBits(4, 8), "2": LayerBits(4, 8)})
    prepared = prepare_pt2e(exported, HybridQuantizer(policy))
    prepared(torch.randn(2, 3, 8, 8))
    converted = convert_pt2e(prepared)
    assert sum("dequantize_per_channel" in str(node.target) for node in converted.graph.nodes) == 2


def test_the_quantizer_annotates_an_exported_graph(net: nn.Module) -> None:
    policy = HybridPolicy({"first": LayerBits(3, 8), "head": LayerBits(4, 16)})
    exported = torch.export.export(net, (X,)).module()
    prepared = prepare_pt2e(exported, HybridQuantizer(policy))
    prepared(X)
    converted = convert_pt2e(prepared)
    ranges = {
        tuple(node.args[-3:-1])
        for node in converted.graph.nodes
        if node.op == "call_function" and "dequantize" in str(node.target)
    }
    assert ranges == {(-4, 3), (0, 255), (-8, 7)}
    assert float((converted(X) - net(X)).norm() / net(X).norm()) < 0.6
    with pytest.raises(PolicyError, match="names nothing"):
        prepare_pt2e(exported, HybridQuantizer(HybridPolicy({"nothing": LayerBits(4, 8)})))


def test_a_bit_that_the_quantizer_would_round_to_zeros_is_refused() -> None:
    exported = torch.export.export(nn.Sequential(nn.Linear(8, 4)).eval(), (torch.randn(2, 8),)).module()
    with pytest.raises(PolicyError, match="gives 0 fewer than 2 bits"):
        prepare_pt2e(exported, HybridQuantizer(HybridPolicy({"0": LayerBits(1, 8)})))


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("hq_plugin.integrations.torchao")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(EngineError, match=r"hq-plugin\[torchao\]"):
        importlib.import_module("hq_plugin.integrations.torchao")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(48, 32), nn.Linear(32, 48, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_a_tied_head_keeps_its_quantized_input() -> None:
    torch.manual_seed(0)
    prepared = torch_ao.prepare(
        Tied().eval(), HybridPolicy({"embed": LayerBits(4, 16), "head": LayerBits(4, 8, dynamic=True)})
    ).eval()
    ids = torch.arange(40).view(4, 10)
    with torch.no_grad():
        prepared(ids)
        small = torch_ao.convert(prepared)
        made = to_torchao(small)
        assert made.head.weight.activation_quantization == "int8_asym_per_token"
        assert made.embed.weight.activation_quantization is None
        assert float((made(ids) - small(ids)).norm() / small(ids).norm()) < 0.02
