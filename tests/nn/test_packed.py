import copy
import pickle
import shutil
from typing import Any

import pytest
import timm
import torch
from torch import nn

from hq_plugin.errors import ModelError
from hq_plugin.nn import (
    PackedConv2d,
    PackedLinear,
    PackedModule,
    cache_weights,
    check_unedited,
    packed_modules,
    packed_type,
    share_packed_weight,
)
from hq_plugin.optimal_qparams import optimal_weight_step
from hq_plugin.policy import LayerBits
from hq_plugin.quantization import fake_quantize_activation, fake_quantize_weight, quantize_weight


def pack(module: nn.Module, bits: LayerBits) -> PackedModule:
    weight = module.weight.detach()
    step = optimal_weight_step(weight, bits.weight)
    qparams = (torch.tensor(0.05), torch.tensor(3)) if bits.activation != 16 else (None, None)
    return PackedModule.from_integers(module, quantize_weight(weight, step, bits.weight), step, bits, *qparams)


def expected(module: nn.Module, bits: LayerBits, x: torch.Tensor) -> torch.Tensor:
    """The float layer with its weight and input fake-quantized by the reference."""
    module = copy.deepcopy(module)
    weight = module.weight.detach()
    module.weight = nn.Parameter(
        fake_quantize_weight(weight, optimal_weight_step(weight, bits.weight), bits.weight), requires_grad=False
    )
    if bits.activation != 16:
        x = fake_quantize_activation(x, torch.tensor(0.05), torch.tensor(3.0), bits.activation)
    return module(x)


LAYERS = [
    (nn.Linear(7, 5), torch.randn(3, 7)),
    (nn.Conv1d(3, 5, 3), torch.randn(2, 3, 9)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.randn(2, 4, 9, 9)),
    (timm.layers.Conv2dSame(3, 5, 3, stride=2), torch.randn(2, 3, 9, 9)),
    (timm.layers.ScaledStdConv2d(3, 5, 3), torch.randn(2, 3, 9, 9)),
]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("activation", [4, 8, 16])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer[0]).__name__)
def test_equals_fake_quantization_bit_for_bit(layer, bits: int, activation: int) -> None:  # type: ignore[no-untyped-def]
    module, x = layer
    width = LayerBits(bits, activation)
    packed = pack(module, width)
    with torch.no_grad():
        assert torch.equal(packed(x), expected(module, width, x))
    assert isinstance(packed, type(module))
    assert "weight" in dict(module.named_parameters()), "the float layer must stay as it is"


def test_embedding() -> None:
    module = nn.Embedding(11, 6, padding_idx=0)
    ids = torch.randint(11, (2, 5))
    assert torch.equal(pack(module, LayerBits(3))(ids), expected(module, LayerBits(3), ids))


def test_memory_is_packed() -> None:
    packed = pack(nn.Linear(64, 32), LayerBits(3))
    assert packed.weight_packed.numel() == 64 * 32 * 3 // 8
    assert (packed.weight_step.dtype, len(packed.weight_step)) == (torch.uint8, 1 + 32)
    assert set(packed.state_dict()) == {"bias", "weight_packed", "weight_step"}


def test_weight_answers_like_a_float_weight() -> None:
    packed = pack(nn.Linear(6, 4), LayerBits(4))
    assert (packed.weight.shape, packed.weight.dtype) == (torch.Size([4, 6]), torch.float32)
    half = copy.deepcopy(packed).to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_moves_do_not_touch_steps(dtype: torch.dtype) -> None:
    packed = pack(nn.Linear(6, 4), LayerBits(4, 8))
    weight = packed.weight.clone()
    moved = copy.deepcopy(packed).to(dtype)
    assert torch.equal(moved.weight_step, packed.weight_step)
    assert moved.activation_step.dtype == torch.float32
    assert moved.bias.dtype == dtype
    assert moved(torch.randn(2, 6, dtype=dtype)).dtype == dtype
    assert torch.equal(moved.to(torch.float32).weight, weight)


def test_the_cache_can_be_switched_off() -> None:
    model = nn.Sequential(pack(nn.Linear(6, 4), LayerBits(4)))
    x = torch.randn(2, 6)
    cached = model(x)
    assert model[0]._cached is not None
    cache_weights(model, False)
    assert torch.equal(model(x), cached)
    assert model[0]._cached is None
    assert copy.deepcopy(cache_weights(model, True))[0]._cached is None


def test_loading_a_state_dict_drops_the_cache() -> None:
    one, other = pack(nn.Linear(6, 4), LayerBits(4)), pack(nn.Linear(6, 4), LayerBits(4))
    x = torch.randn(2, 6)
    other(x)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


def test_sharing() -> None:
    linear = nn.Linear(6, 4)
    one, other = pack(linear, LayerBits(4)), pack(linear, LayerBits(4))
    share_packed_weight(one, other)
    assert one.weight_packed is other.weight_packed


def test_types_and_names() -> None:
    assert packed_type(nn.Linear) is PackedLinear
    assert packed_type(PackedConv2d) is PackedConv2d
    packed = pack(nn.Conv2d(1, 2, 3), LayerBits(2, 4))
    assert type(packed).__name__ == "PackedConv2d"
    assert "bits=W2A4" in repr(packed)
    assert list(packed_modules(nn.Sequential(packed))) == ["0"]


def test_missing_activation_step() -> None:
    linear = nn.Linear(6, 4)
    with pytest.raises(ValueError, match="activation_step"):
        PackedModule.from_integers(linear, torch.zeros(4, 6, dtype=torch.int8), torch.ones(4), LayerBits(4, 8))


@pytest.mark.parametrize("cached", [True, False])
def test_torch_compile_makes_one_graph_of_every_width(cached: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        pack(nn.Conv2d(3, 8, 3), LayerBits(3, 8)),
        nn.ReLU(),
        pack(nn.Conv2d(8, 8, 3, groups=8), LayerBits(6, 4)),
        nn.Flatten(),
        pack(nn.Linear(128, 64), LayerBits(5, 16)),
        nn.ReLU(),
        pack(nn.Linear(64, 7), LayerBits(2, 8)),
    ).eval()
    cache_weights(model, cached)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="inductor" if shutil.which("g++") else "aot_eager")
        found = compiled(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert all((layer._cached is not None) == cached for layer in packed_modules(model).values())


@pytest.mark.parametrize("activation", [2, 8])
def test_traces_and_transforms_quantize_inputs(activation: int) -> None:
    layers = [nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)]
    model = nn.Sequential(*(pack(layer, LayerBits(4, activation)) for layer in layers)).requires_grad_(False)
    x = torch.randn(5, 2, 8, 8)
    expected = model(x)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)
    assert torch.equal(torch.vmap(lambda one: model(one[None])[0])(x), expected)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=0, atol=1e-6)


def test_new_steps_of_an_input_count_at_once() -> None:
    layer, x = pack(nn.Linear(6, 4), LayerBits(8, 4)), torch.randn(3, 6)
    before = layer(x)
    layer.activation_step.mul_(3)
    assert not torch.equal(layer(x), before)
    layer.activation_step = layer.activation_step / 3
    torch.testing.assert_close(layer(x), before)
    layer.load_state_dict({**layer.state_dict(), "activation_zero_point": torch.tensor(9, dtype=torch.int32)})
    assert not torch.allclose(layer(x), before)


def test_gradients_reach_the_input() -> None:
    layer, x = pack(nn.Linear(6, 4), LayerBits(8, 8)), torch.rand(3, 6, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0


def test_a_forward_in_inference_mode_leaves_gradients_possible() -> None:
    layer = pack(nn.Linear(6, 4), LayerBits(4, 16))
    with torch.inference_mode():
        layer(torch.randn(2, 6))
    x = torch.randn(2, 6, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 6))


def test_an_embedding_that_renormalises_its_rows_is_not_edited() -> None:
    torch.manual_seed(0)
    packed = pack(nn.Embedding(10, 8, max_norm=0.5), LayerBits(5, 16))
    ids = torch.arange(10)
    assert float(packed(ids).norm(dim=1).max()) <= 0.5 + 1e-4
    check_unedited(packed)
    assert torch.equal(packed(ids), packed(ids))


@pytest.mark.parametrize("edits", [True, False])
def test_a_weight_that_is_lent_is_taken_back(edits: bool) -> None:
    packed = cache_weights(pack(nn.Linear(6, 4), LayerBits(4, 16)), False)
    x = torch.randn(2, 6)
    before = packed(x)
    assert packed._lent is None  # its own forward keeps nothing
    weight = packed.weight
    assert packed.weight is weight
    if edits:
        weight.data += 1.0
        torch.testing.assert_close(packed(x), before + x.sum(1, keepdim=True))
        with pytest.raises(ModelError, match="edited"):
            check_unedited(packed)
    else:
        assert torch.equal(packed(x), before)
        check_unedited(packed)
        assert packed._cached is None
    assert packed._lent is None


def test_packed_layers_are_pickled_by_the_class_that_they_stand_for() -> None:
    model = timm.create_model("tf_efficientnet_lite0", num_classes=3).eval()
    model.conv_stem = pack(model.conv_stem, LayerBits(4, 8))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        again = pickle.loads(pickle.dumps(model))
        assert type(again.conv_stem) is type(model.conv_stem)
        assert type(copy.deepcopy(model.conv_stem)) is type(model.conv_stem)
        assert torch.equal(again(x), expected)


@pytest.mark.parametrize("move", [lambda m: m._apply(lambda t: t.clone()), lambda m: m.to("meta")])
def test_tied_weights_stay_tied_when_they_are_moved(move: Any) -> None:
    """To another device every tensor is a new one."""
    first, second = (pack(nn.Linear(8, 4), LayerBits(3, 8)) for _ in range(2))
    share_packed_weight(first, second)
    untied = pack(nn.Linear(8, 4), LayerBits(3, 8))
    model = nn.ModuleList([first, second, untied])
    for _ in range(2):
        before = dict(first.named_buffers())
        move(model)
        for name in ("weight_packed", "weight_step"):
            assert getattr(first, name) is getattr(second, name)
            assert getattr(first, name) is not getattr(untied, name)
            assert getattr(first, name) is not before[name] or before[name].is_meta
        assert first.activation_step is not second.activation_step
