import copy
import importlib
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LayoutLMConfig, LayoutLMForSequenceClassification

import hq_plugin as hq
from hq_plugin import EngineError, ExportError, HQWarning, HybridPolicy, LayerBits, ModelError, torch_ao
from hq_plugin.cost import CostTable
from hq_plugin.integrations.onnxruntime.causal import generate
from hq_plugin.integrations.onnxruntime.sessions import open_session
from hq_plugin.integrations.onnxruntime.verify import difference
from hq_plugin.nn import with_split_tables
from hq_plugin.nn.split import principal_axes
from hq_plugin.packing import pack_bits
from hq_plugin.sites import find_sites
from hq_plugin.space import SearchSpace
from tests.integrations.huggingface.conftest import (
    BERT,
    SMOKE,
    TEXTS,
    bart,
    bert,
    gpt2,
    llama,
    mixtral,
    t5,
    tokenizer,
    vit,
    whisper,
)


def packed(model: nn.Module, bits: dict[str, LayerBits], x: Tensor, whole: bool = False) -> nn.Module:
    prepared = torch_ao.prepare(model, HybridPolicy(bits), whole_zero_points=whole).eval()
    with torch.no_grad():
        prepared(x)
    return torch_ao.convert(prepared)


class Reads(nn.Module):
    """Its forward reads what its layers say of themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(50, 32), nn.Conv1d(32, 32, 3, padding=1), nn.Linear(32, 5)
        self.head.tag = 2.0  # type: ignore[assignment]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids.clamp(max=self.words.num_embeddings - 1))
        x = self.mix(x.transpose(1, 2)).mean(2) * self.mix.kernel_size[0]
        return self.head(x * self.head.in_features**-0.5) * self.head.tag  # type: ignore[operator]


@pytest.mark.parametrize("activation", [8, 16])
def test_what_code_reads_of_a_layer_is_there(activation: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = [torch.randint(50, (16, 7)) for _ in range(4)]
    small = hq.quantize(Reads().eval(), "5bit", data, activation_bits=activation, config=SMOKE)
    assert hq.export(small, tmp_path / "reads.onnx", data[0]).difference < 0.01


class NamedOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.inner(x))
        scores = self.outer(hidden)
        return {"loss": None, "scores": scores, "states": (hidden, scores)}


def test_outputs_keep_their_names(tmp_path: Path) -> None:
    data = [torch.randn(8, 16) for _ in range(4)]
    small = hq.quantize(NamedOutputs().eval(), "8bit", data, config=SMOKE)
    hq.export(small, tmp_path / "named.onnx", data[0])
    made = session(tmp_path / "named.onnx")
    assert [output.name for output in made.get_outputs()] == ["scores", "states.0", "states.1"]
    found = made.run(["states.0"], {made.get_inputs()[0].name: data[0].numpy()})[0]
    np.testing.assert_allclose(found, small(data[0])["states"][0].detach(), atol=0.05)


def test_example_inputs_may_be_slices(tmp_path: Path) -> None:
    ids = torch.randint(3, 64, (8, 16))
    small = hq.quantize(bart(), "5bit", [{"input_ids": ids, "decoder_input_ids": ids}] * 2, config=SMOKE)
    found = hq.export(small, tmp_path / "bart.onnx", {"input_ids": ids[:2], "decoder_input_ids": ids[:2, :6]})
    assert found.difference < 0.02
    assert session(tmp_path / "bart.onnx").get_outputs()[0].name == "logits"


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    small = hq.quantize(Reads().eval(), "5bit", [torch.randint(50, (16, 7)) for _ in range(4)], config=SMOKE)
    with pytest.raises(ExportError, match=r"is a directory\. Give a file"):
        hq.export(small, tmp_path)  # and not that example inputs are missing


def session(path: Path) -> onnxruntime.InferenceSession:
    return open_session(path)


def run(path: Path, *inputs: Tensor) -> np.ndarray:
    made = session(path)
    feed = {entry.name: value.numpy() for entry, value in zip(made.get_inputs(), inputs, strict=True)}
    found: np.ndarray = made.run(None, feed)[0]
    return found


def error(path: Path, model: nn.Module, *inputs: Tensor) -> float:
    with torch.no_grad():
        expected = model(*inputs).numpy()
    return float(np.linalg.norm(run(path, *inputs) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("whole", "group"), [(False, 0), (False, 32), (True, 32)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_weights_of_every_width(bits: int, whole: bool, group: int, tmp_path: Path) -> None:
    torch.manual_seed(bits)
    model = nn.Sequential(nn.Linear(96, 40), nn.ReLU(), nn.Linear(40, 7)).eval()
    x = torch.randn(4, 96)
    small = packed(model, {"0": LayerBits(bits, 16, group), "2": LayerBits(bits, 16)}, x, whole)
    found = hq.export(small, tmp_path / "m.onnx", x, accuracy_level=1)
    assert error(tmp_path / "m.onnx", small, x) < 1e-5
    assert error(tmp_path / "m.onnx", small, torch.randn(1, 96)) < 1e-5
    assert [layer.operator for layer in found.layers] == ["MatMulNBits"] * 2
    assert all(layer.width in (2, 4, 8) and layer.width >= layer.bits.weight for layer in found.layers)
    graph = onnx.load(tmp_path / "m.onnx").graph
    floats = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    # Steps, biases and what is left of fractional zero points, but no weight.
    assert max(int(np.prod(t.dims)) for t in floats) <= 96 * 40 // 32
    assert sum(node.op_type == "ReduceSum" for node in graph.node) == int(group > 0 and not whole and bits < 5)


@pytest.mark.parametrize("activation", [2, 4, 8])
@pytest.mark.parametrize("group", [0, 32])
def test_inputs_with_a_step_a_row(activation: int, group: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 40), nn.GELU(), nn.Linear(40, 7)).eval()
    x = torch.randn(4, 5, 96) * torch.rand(4, 5, 1)
    bits = {"0": LayerBits(5, activation, group, True), "2": LayerBits(3, activation, dynamic=True)}
    small = packed(model, bits, x)
    found = hq.export(small, tmp_path / "m.onnx", x)
    assert [layer.operator for layer in found.layers] == [
        "DequantizeLinear" if group else "MatMulInteger",
        "MatMulInteger",
    ]
    # GELU is not computed to the last bit, and a value that lies between two integers may be rounded to the other.
    assert error(tmp_path / "m.onnx", small, x) < (1e-2 if activation > 2 else 0.1)
    assert error(tmp_path / "m.onnx", small, torch.randn(1, 5, 96)) < (1e-2 if activation > 2 else 0.1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.head = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.bn(self.first(x)))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("activation", [4, 8, 16])
def test_convolutions_with_and_without_quantized_inputs(activation: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 12, 12)
    for _ in range(3):
        model(x)
    bits = {"first": LayerBits(8, activation), "second": LayerBits(3, activation), "head": LayerBits(2, activation)}
    small = packed(model.eval(), bits, x)
    hq.export(small, tmp_path / "m.onnx", x, accuracy_level=1)
    # A tie may round to the other side: x * (1 / step) here, x / step there.
    assert error(tmp_path / "m.onnx", small, torch.randn(5, 3, 12, 12)) < (1e-5 if activation == 16 else 0.03)
    graph = onnx.load(tmp_path / "m.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert "BatchNormalization" not in kinds
    # Of three inputs, one after a clip and before it.
    assert kinds.count("QuantizeLinear") == (0 if activation == 16 else 4)
    assert kinds.count("MatMulIntegerToFloat") == (0 if activation == 16 else 1)
    assert {t.data_type for t in graph.initializer if "second" in t.name and "weight_int" in t.name} == {
        onnx.TensorProto.INT4
    }


class ScaledConv(nn.Conv2d):
    """A convolution with attributes of its own, as NFNet's."""

    def __init__(self) -> None:
        super().__init__(3, 8, 3)
        self.scale, self.rest, self.input = 0.5, None, "NCHW"
        self.gain = nn.Parameter(torch.rand(8, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight * self.gain * self.scale, self.bias)


def test_layers_keep_attributes_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    small = packed(nn.Sequential(ScaledConv()).eval(), {"0": LayerBits(4, 16)}, x)
    hq.export(small, tmp_path / "m.onnx", x)
    assert error(tmp_path / "m.onnx", small, x) < 1e-5


def test_sums_of_8_bit_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """x86 without VNNI clips them, in ONNX Runtime too unless it is told not to; nobody finds out by himself."""
    torch.manual_seed(0)
    writer = importlib.import_module("hq_plugin.integrations.onnxruntime.export")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(512, 8)).eval()
    x = torch.randn(2, 3, 12, 12)
    for wide, names in (((8, 8), ["0", "2", "4"]), ((7, 8), []), ((8, 7), [])):
        small = packed(model, dict.fromkeys("024", LayerBits(*wide)), x)
        for clipping in (True, False):
            monkeypatch.setattr(writer, "saturates", lambda clipping=clipping: clipping)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", HQWarning)
                found = hq.export(small, tmp_path / "m.onnx", x)
            said = [str(entry.message) for entry in caught if "VNNI" in str(entry.message)]
            assert len(said) == (1 if clipping and names else 0)
            assert all('add_session_config_entry("session.x64quantprecision", "1")' in text for text in said)
        assert [layer.name for layer in found.clipped] == names
        assert ("(0 and 2 more)" in str(found)) == bool(names)
        # As large as products get; a tie may round to the other side.
        assert error(tmp_path / "m.onnx", small, 3 * x) < 0.03
    graph = onnx.load(tmp_path / "m.onnx").graph
    zeros = [node.input[2] for node in graph.node if "weight_int" in node.input[0]]
    assert len(set(zeros)) == len(zeros) > 1


def test_batchnorm_is_folded_whatever_its_sign(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.bn.weight[3], model.bn.weight[4] = -1, 0
    small = packed(model, {"first": LayerBits(7, 16)}, x)
    hq.export(small, tmp_path / "m.onnx", x)
    assert error(tmp_path / "m.onnx", small, x) < 1e-5
    assert "BatchNormalization" not in [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]


def test_a_sign_that_no_integer_can_take_keeps_its_batchnorm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.bn.weight[3] = -1
    small = packed(model, {"first": LayerBits(8, 16)}, x)
    integers = torch.full((16, 3, 3, 3), -128, dtype=torch.int8)
    small.first.weight_packed = pack_bits(integers, 8)
    small.first.set_kernel(None)
    hq.export(small, tmp_path / "m.onnx", x)
    assert error(tmp_path / "m.onnx", small, x) < 1e-5
    assert "BatchNormalization" in [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]


class Pointwise(nn.Module):
    """Convolutions of one pixel whose result stays float, with and without a stride and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.plain = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.strided, self.head = nn.Conv2d(8, 8, 1, stride=2), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.plain(x)
        return self.head(torch.tanh(self.strided(x)).flatten(2).transpose(1, 2))


def test_products_run_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Pointwise().eval(), torch.randn(2, 3, 8, 8)
    small = packed(model, {name: LayerBits(5, 8) for name in ("stem", "plain", "strided", "head")}, x)
    hq.export(small, tmp_path / "m.onnx", x)
    assert error(tmp_path / "m.onnx", small, torch.randn(3, 3, 8, 8)) < 0.02
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 2
    assert kinds.count("Conv") == 2


def test_the_file_runs_with_onnxruntime_alone_and_is_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
    x = torch.randn(3, 512)
    small = packed(model, {"0": LayerBits(4, 16, 64), "2": LayerBits(2, 16, 64)}, x, whole=True)
    found = hq.export(small, tmp_path / "m.onnx", x, accuracy_level=1)
    # Integers, float32 steps and zero points of the same width; biases.
    expected = sum(512 * 512 * bits // 8 + 512 * 8 * 4 + 512 * 8 * bits // 8 for bits in (4, 2)) + 2 * 512 * 4
    assert expected <= found.size <= expected + 4000
    np.save(tmp_path / "x.npy", x.numpy())
    alone(
        "file, x, y = sys.argv[1:]\n"
        "made = onnxruntime.InferenceSession(file)\n"
        "np.save(y, made.run(None, {made.get_inputs()[0].name: np.load(x)})[0])\n",
        *(tmp_path / name for name in ("m.onnx", "x.npy", "y.npy")),
    )
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), small(x).numpy(), rtol=1e-4, atol=1e-5)


def alone(code: str, *arguments: Path) -> None:
    """Runs code in a process that has onnxruntime and numpy, but neither torch nor this library."""
    head = (
        "import sys\nfor name in ('torch', 'transformers', 'hq_plugin'): sys.modules[name] = None\n"
        "import numpy as np, onnxruntime\n"
    )
    subprocess.run([sys.executable, "-c", head + code, *map(str, arguments)], check=True, env=dict(os.environ))


class Mixed(nn.Module):
    """Convolutions, linear layers and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 128, 3, stride=2, padding=1)
        self.embed = nn.Embedding(512, 128)
        self.first, self.second = nn.Linear(128, 1024), nn.Linear(1024, 128)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = torch.relu(self.deep(torch.relu(self.stem(x)))).mean((2, 3)) + self.embed(ids)
        return self.second(torch.relu(self.first(x)))


def test_the_file_is_as_small_as_the_cost_table_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Mixed().eval(), (torch.randn(3, 3, 16, 16), torch.randint(512, (3,)))
    table = find_sites(model, lambda made: made(*inputs), 3)
    config = hq.Config(weight_bits=(2, 3, 4, 5, 8), activation_bits=(8, 16), group_size=64)
    space = SearchSpace.build(table, config)
    asked = {"stem": 8, "deep": 4, "embed": 3, "first": 3, "second": 5}
    stored = {"stem": 8, "deep": 4, "embed": 4, "first": 4, "second": 8}

    def policy(widths: dict[str, int]) -> HybridPolicy:
        conv = {site.name: site.kind == "conv2d" for site in table}
        return HybridPolicy(
            {
                name: LayerBits(bits, 8 if conv[name] else 16, 0 if conv[name] else 64)
                for name, bits in widths.items()
            }
        )

    small = torch_ao.prepare(model, policy(asked), whole_zero_points=True).eval()
    with torch.no_grad():
        small(*inputs)
    small = torch_ao.convert(small)
    found = hq.export(small, tmp_path / "m.onnx", inputs)
    assert {layer.name: layer.width for layer in found.layers} == stored
    assert {layer.name for layer in found.widened} == {"embed", "first", "second"}
    assert "first: 3 bits, 4 in the file" in str(found)
    counted = CostTable(space).costs(space.genome(policy(stored))).size
    # The runtime's steps are float32, and so are zero points of embeddings: 2.5 to 5 bytes a group more.
    groups = sum(math.prod(site.weight_shape) for site in table if site.kind != "conv2d") // 64
    assert counted <= found.size <= counted + 5 * groups + 6_000
    assert found.size < 0.2 * table.float_bytes


def test_targets_restrict_widths_and_zero_points() -> None:
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    data = [torch.randn(8, 128)]
    small = hq.quantize(
        model,
        "5bit",
        data,
        config=SMOKE,
        target="onnxruntime",
        group_size=32,
        activation_bits=16,
    )
    result: hq.Result = small.hq  # type: ignore[assignment]
    assert {bits.weight for bits in result.policy.values()} <= {2, 4, 8}
    with pytest.raises(hq.ConfigError, match="onnxruntime runs none of them fast, but 2, 4, 7, 8"):
        hq.Config(target="onnxruntime", weight_bits=(3, 5))
    with pytest.raises(hq.ConfigError, match="target"):
        hq.Config(target="tensorrt")  # type: ignore[arg-type]


def test_the_target_takes_weights_of_7_bits_where_inputs_have_8(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16), nn.Linear(16, 4)).eval()
    data = [torch.randn(8, 3, 8, 8)]
    small = hq.quantize(model, "40%", data, config=SMOKE, target="onnxruntime", pinned={"0": 8, "4": (8, 16)})
    result: hq.Result = small.hq  # type: ignore[assignment]
    assert [str(bits) for bits in result.policy.values()] == ["W8A8", "W7A8", "W8"]
    assert [layer.name for layer in hq.export(small, tmp_path / "m.onnx", data[0]).clipped] == ["0"]


def large_bert() -> BertModel:
    """Its vocabulary is split into tables."""
    return BertModel(BertConfig(**{**BERT, "vocab_size": 5000})).eval()


@pytest.mark.parametrize("build", [bert, pytest.param(large_bert, marks=pytest.mark.slow), vit])
def test_encoders_with_their_own_example_inputs(build, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    small = hq.quantize(build(), "5bit", config=SMOKE)
    hq.export(small, tmp_path / "m.onnx")
    made = session(tmp_path / "m.onnx")
    if build is not vit:
        ids = torch.randint(3, 60 if build is bert else 5000, (3, 11))
        feed = {entry.name: np.ones((3, 11), dtype=np.int64) for entry in made.get_inputs()}
        feed["input_ids"] = ids.numpy()
        expected = small(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    else:
        pixels = torch.randn(3, 3, 32, 32)
        feed, expected = {made.get_inputs()[0].name: pixels.numpy()}, small(pixel_values=pixels)[0]
    found = torch.tensor(made.run(None, feed)[0])
    assert float((found - expected).norm() / expected.norm()) < 0.05


class TwoHeads(nn.Module):
    """Class scores, the best class, and what another head says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.first(x), self.first(x).argmax(-1), self.second(x)


def test_every_output_is_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 16)
    small = hq.quantize(TwoHeads(), "5bit", [x], config=SMOKE)
    written = hq.export(small, tmp_path / "m.onnx", x, accuracy_level=1)
    assert written.difference is not None
    assert written.difference < 1e-3
    # The same file beside a model whose second head alone says the opposite.
    other = copy.deepcopy(small)
    other.second.register_forward_hook(lambda module, args, output: -output)
    apart = difference(tmp_path / "m.onnx", other, (x,), {})
    assert apart == pytest.approx(2, abs=0.01)


def layoutlm() -> LayoutLMForSequenceClassification:
    return LayoutLMForSequenceClassification(LayoutLMConfig(**BERT)).eval()


@pytest.mark.parametrize("build", [t5, *(pytest.param(b, marks=pytest.mark.slow) for b in (whisper, layoutlm))])
def test_parts_that_cache_and_masks_of_one_row(build, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    small = hq.quantize(build(), "5bit", config=SMOKE)
    written = hq.export(small, tmp_path / "m.onnx", accuracy_level=1)
    assert written.difference is not None
    assert written.difference < 1e-3


@pytest.mark.parametrize("build", [llama, *(pytest.param(b, marks=pytest.mark.slow) for b in (gpt2, mixtral))])
def test_a_language_model_generates_with_a_cache(build, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    small = hq.quantize(
        build(), "5.2bit", TEXTS, config=SMOKE, processor=tokenizer(), sequence_length=16, target="onnxruntime"
    )
    written = hq.export(small, tmp_path / "m.onnx", accuracy_level=1)
    assert written.difference is not None
    assert written.difference < 1e-4
    made = session(tmp_path / "m.onnx")
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    found = generate(made, ids.numpy(), 6)
    expected = small.generate(  # type: ignore[operator]
        ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=1
    )
    assert np.array_equal(found, expected.numpy())
    assert generate(made, ids[:1].numpy(), 6, stop=int(found[0, 3])).shape == (1, 4)
    # Token by token, in a process of its own.
    alone(
        "file, out = sys.argv[1:]\n"
        "made = onnxruntime.InferenceSession(file)\n"
        "names = [entry.name for entry in made.get_inputs()]\n"
        "new = ids = np.array([[3, 4, 5]])\n"
        "past = [np.zeros((1, e.shape[1], 0, e.shape[3]), np.float32) for e in made.get_inputs()[2:]]\n"
        "for _ in range(6):\n"
        "    feed = dict(zip(names, [new, np.ones_like(ids), *past], strict=True))\n"
        "    logits, *past = made.run(None, feed)\n"
        "    assert past[0].shape[2] == ids.shape[1]\n"
        "    new = logits[:, -1:].argmax(-1)\n"
        "    ids = np.concatenate([ids, new], 1)\n"
        "np.save(out, ids)\n",
        tmp_path / "m.onnx",
        tmp_path / "ids.npy",
    )
    assert np.array_equal(np.load(tmp_path / "ids.npy"), found[:1])
    hq.export(small, tmp_path / "plain.onnx", {"input_ids": ids}, cache=False)
    assert [entry.name for entry in session(tmp_path / "plain.onnx").get_inputs()] == ["input_ids"]


def test_padding_and_samples_without_any_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = hq.quantize(llama(), "5.2bit", TEXTS, config=SMOKE, processor=tokenizer(), sequence_length=16)
    hq.export(small, tmp_path / "m.onnx", accuracy_level=1)
    operators = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert {"Attention", "RotaryEmbedding", "RMSNormalization"} <= operators
    made = session(tmp_path / "m.onnx")
    ids = torch.randint(3, 60, (4, 7))
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, 5:], mask[3] = 0, 0, 0
    with torch.no_grad():
        expected = small(input_ids=ids, attention_mask=mask).logits.numpy()
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    for entry in made.get_inputs()[2:]:
        feed[entry.name] = np.zeros((4, entry.shape[1], 0, entry.shape[3]), np.float32)
    assert np.allclose(made.run(None, feed)[0], expected, atol=1e-4)


def test_positions_that_are_looked_up_begin_after_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = hq.quantize(gpt2(), "5.2bit", TEXTS, config=SMOKE, processor=tokenizer(), sequence_length=16)
    hq.export(small, tmp_path / "m.onnx", accuracy_level=1)
    made = session(tmp_path / "m.onnx")
    ids = torch.tensor([[0, 0, 0, 3, 4, 5, 6]])
    feed = {"input_ids": ids.numpy(), "attention_mask": np.array([[0, 0, 0, 1, 1, 1, 1]])}
    for entry in made.get_inputs()[2:]:
        feed[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
    with torch.no_grad():
        expected = small(input_ids=ids[:, 3:]).logits.numpy()
    assert np.allclose(made.run(None, feed)[0][:, 3:], expected, atol=1e-4)


def test_an_operator_that_cannot_be_exported_is_named_with_its_layer(tmp_path: Path) -> None:
    class Bessel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    for odd, operator in ((Bessel(), "bessel_j0"), (Branch(), "data-dependent")):
        model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), odd)).eval()
        small = packed(model, {"0": LayerBits(4, 16)}, torch.randn(2, 8))
        with pytest.raises(ExportError, match=rf"layer '1\.1'.*{operator}"):
            hq.export(small, tmp_path / "m.onnx", torch.randn(2, 8))
        assert not list(tmp_path.iterdir())


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(2, 8)
    with pytest.raises(ModelError, match="no packed layer"):
        hq.export(model, tmp_path / "m.onnx", x)
    small = packed(model, {"0": LayerBits(4, 16)}, x)
    with pytest.raises(ExportError, match="example_inputs are needed"):
        hq.export(small, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="accuracy_level=7"):
        hq.export(small, tmp_path / "m.onnx", x, accuracy_level=7)
    with pytest.raises(ExportError, match="does not generate"):
        hq.export(small, tmp_path / "m.onnx", x, cache=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        hq.export(small, tmp_path / "file" / "m.onnx", x)
    monkeypatch.setitem(sys.modules, "onnx", None)
    for name in [name for name in sys.modules if name.startswith("hq_plugin.integrations.onnxruntime")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(EngineError, match=r"hq-plugin\[onnx\]"):
        hq.export(small, tmp_path / "m.onnx", x)


@pytest.mark.parametrize("group", [8, 24])
def test_groups_that_no_block_of_the_runtime_fits(group: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 7)).eval()
    x = torch.randn(4, 24)
    small = packed(model, {"0": LayerBits(3, 16, group), "2": LayerBits(4, 16)}, x)
    found = hq.export(small, tmp_path / "m.onnx", x)
    assert error(tmp_path / "m.onnx", small, x) < 1e-2
    assert [layer.operator for layer in found.layers] == ["DequantizeLinear", "MatMulNBits"]


class Returns(nn.Module):
    """Returns what lies before a BatchNorm, and a feature map that the next layer quantizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.third = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raw = self.first(x)
        features = torch.relu(self.second(torch.relu(self.bn(raw))))
        return self.third(features), raw, features


def test_results_that_are_returned_stay_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Returns().eval()
    x = torch.randn(2, 3, 12, 12)
    names = ("first", "second", "third")
    small = packed(model, {name: LayerBits(4, 8) for name in names}, x)
    hq.export(small, tmp_path / "m.onnx", x)
    made = session(tmp_path / "m.onnx")
    with torch.no_grad():
        expected = small(x)
    for wanted, found in zip(expected, made.run(None, {made.get_inputs()[0].name: x.numpy()}), strict=True):
        assert float((torch.as_tensor(found) - wanted).norm() / wanted.norm()) < 2e-3


def test_the_model_is_not_changed_whatever_its_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)).eval()
    x = torch.randn(4, 3, 9, 9)
    small = packed(model, {"0": LayerBits(5, 8)}, x).train()
    before = copy.deepcopy(small.state_dict())
    written = hq.export(small, tmp_path / "m.onnx", x)
    assert written.difference is not None
    assert written.difference < 1e-3
    assert small.training
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def test_a_model_in_half_precision_computes_in_single_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = torch.randn(4, 64)
    small = packed(model, {"0": LayerBits(4, 16, 32), "2": LayerBits(5, 8)}, x).half()
    written = hq.export(small, tmp_path / "m.onnx", x.half(), accuracy_level=1)
    assert written.difference is not None
    assert written.difference < 1e-3
    assert next(small.parameters()).dtype == torch.float16


class Named(nn.Module):
    """Calls its layers by keyword, and adds what is the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.dynamic, self.first = nn.Embedding(12, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.static, self.conv = nn.Linear(32, 32), nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, ids: Tensor, shift: Tensor) -> Tensor:
        x = self.dynamic(input=self.embed(input=ids)) + shift
        return self.conv(input=self.static(input=self.first(input=x)))


def test_layers_called_by_keyword_and_inputs_of_one_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids, shift = torch.randint(12, (4, 6)), torch.randn(1, 6, 32)
    policy = {"embed": LayerBits(4, 16), "dynamic": LayerBits(4, 8, dynamic=True), "first": LayerBits(4, 16)}
    policy |= {"static": LayerBits(4, 8), "conv": LayerBits(4, 8)}
    prepared = torch_ao.prepare(Named().eval(), HybridPolicy(policy)).eval()
    with torch.no_grad():
        prepared(ids, shift)
    small = torch_ao.convert(prepared)
    written = hq.export(small, tmp_path / "m.onnx", (ids, shift), accuracy_level=1)
    assert written.difference is not None
    assert written.difference < 0.02


class Transposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_steps_of_a_weight_that_is_used_transposed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Transposed(24, 24, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 1, 24)[:, None])
    x = torch.randn(16, 24)
    small = packed(model, {"0": LayerBits(8, 8)}, x)
    hq.export(small, tmp_path / "m.onnx", x)
    assert error(tmp_path / "m.onnx", small, x) < 1e-2


class ReadsItsEmbedding(nn.Module):
    """A language model in small: its head is the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.middle = nn.Embedding(50, 32), nn.Linear(32, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.middle(self.words(ids)), self.words.weight)


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True, activation="gelu")
    return nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(32, 5))


@pytest.mark.parametrize("activation", [8, 16])
@pytest.mark.parametrize("build", [ReadsItsEmbedding, attention])
def test_weights_that_are_read_around_their_layer(build: Any, activation: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randint(50, (8, 6)) if build is ReadsItsEmbedding else torch.randn(8, 6, 32)
    small = hq.quantize(build().eval(), "6bit", [x] * 4, config=SMOKE, activation_bits=activation)
    found = hq.export(small, tmp_path / "m.onnx", x, accuracy_level=1)
    # The runtime makes products of 8-bit integers of some that are float in the file.
    assert error(tmp_path / "m.onnx", small, x) < 2e-2
    if build is attention:
        operators = {layer.name: layer.operator for layer in found.layers}
        assert operators["0.layers.0.self_attn.out_proj"] == "DequantizeLinear"
        assert (operators["1"] == "MatMulNBits") == (activation == 16)


class Bags(nn.Module):
    """An operator that becomes a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(100, 32), nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))


def test_what_loops_read_is_not_dropped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(100, (4, 6))
    small = hq.quantize(Bags().eval(), "5bit", [ids] * 4, config=SMOKE)
    hq.export(small, tmp_path / "m.onnx", ids)
    assert error(tmp_path / "m.onnx", small, ids) < 2e-2


class TakesADict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 5)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.layer(batch["x"]) + batch["more"]


def test_inputs_in_containers_and_one_sample_beside_more_rows(tmp_path: Path) -> None:
    batch = {"x": torch.randn(4, 32), "more": torch.randn(4, 1)}
    small = packed(TakesADict().eval(), {"layer": LayerBits(4, 16)}, batch)  # type: ignore[arg-type]
    hq.export(small, tmp_path / "m.onnx", (batch,))
    inputs = session(tmp_path / "m.onnx").get_inputs()
    assert [entry.shape[0] == 4 for entry in inputs] == [False, False]
    mixed = {"x": torch.randn(1, 32), "more": torch.randn(6, 1)}
    with pytest.warns(HQWarning, match="stays 1"):
        hq.export(small, tmp_path / "m.onnx", (mixed,))


@pytest.mark.slow
def test_states_of_another_kind_than_keys_and_values(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**sizes)).eval()
    small = hq.quantize(model, "5bit", [torch.randint(64, (4, 8))] * 4, config=SMOKE)
    with pytest.raises(ExportError, match="does not generate"):
        hq.export(small, tmp_path / "m.onnx", cache=True)
    hq.export(small, tmp_path / "m.onnx")


def test_tables_that_are_stored_alike_are_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(400, 16), nn.Linear(16, 5)).eval()
    split = with_split_tables(model, ["0.parts.5.1"], axes={"0": principal_axes(model[0].weight)})
    widths = {0: (8, 8), 1: (6, 5), 2: (4, 3), 3: (4, 2), 4: (2, 0), 5: (3, 0)}
    bits = {f"0.parts.{n}.{column}": LayerBits(width) for n in widths for column, width in enumerate(widths[n])}
    ids = torch.randint(400, (4, 6))
    small = packed(split, {**bits, "0.basis": LayerBits(8), "1": LayerBits(8)}, ids)
    found = hq.export(small, tmp_path / "m.onnx", ids, accuracy_level=1)
    assert error(tmp_path / "m.onnx", small, ids) < 1e-5
    assert error(tmp_path / "m.onnx", small, torch.arange(400).view(1, -1)) < 1e-5
    # Three kinds in place of six: integers and steps of each block, but for the one that is left out.
    gathers = [node for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type == "Gather"]
    assert len(gathers) <= 14
    operators = {layer.name: (layer.operator, layer.width) for layer in found.layers}
    assert operators["0.parts.4.1"] == ("ConstantOfShape", 0)
    assert operators["0.parts.3.0"] == ("Gather, DequantizeLinear", 4)
    assert operators["0.parts.1.1"] == ("Gather, DequantizeLinear", 8)
