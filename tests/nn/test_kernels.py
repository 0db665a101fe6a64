import itertools

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hq_plugin import LayerBits
from hq_plugin.kernels import relative_error
from hq_plugin.nn import PackedModule
from hq_plugin.nn.integer_inputs import CHUNK
from hq_plugin.nn.kernels import KERNELS, Bound, ByRows
from hq_plugin.nn.saturation import saturates
from hq_plugin.quantization import weight_range, weight_rows

#: Rows and inputs of weights: round ones, odd ones, single ones.
SHAPES = [(16, 256), (48, 192), (32, 40), (8, 24), (7, 33), (33, 64), (5, 48), (1, 16), (16, 1), (1, 1)]
#: Shapes of inputs without their last dimension.
INPUTS = [(1,), (5,), (2, 3), (1, 1, 4), (70,), (0,)]


def packed(layer: nn.Module, bits: LayerBits, seed: int = 0) -> PackedModule:
    """A packed layer with random integers, steps and zero points."""
    generator = torch.Generator().manual_seed(seed)
    weight = layer._parameters["weight"]
    assert weight is not None
    low, high = weight_range(bits.weight)
    integers = torch.randint(low, high + 1, weight.shape, generator=generator).to(torch.int8)
    rows = weight_rows(weight, bits.group_size).shape[0]
    step = (0.5 + torch.rand(rows, generator=generator)) / 2**bits.weight
    zero = torch.rand(rows, generator=generator) * 2 - 1 if bits.group_size else None
    return PackedModule.from_integers(
        layer, integers, step, bits, torch.tensor(0.031), torch.tensor(3), zero=zero
    ).eval()


@torch.no_grad()
def error(layer: PackedModule, name: str, x: Tensor) -> float:
    """The error of a kernel relative to the reference; the layer is left as it was."""
    expected = layer(x)
    layer.set_kernel(Bound(KERNELS[name], layer))
    found = layer(x)
    layer.set_kernel(None)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    return relative_error(found, expected, layer, x)


def taken(name: str, bits: int, group: int, rows: int, inputs: int) -> bool:
    """What a kernel for linear layers is said to take."""
    if name == "int4":
        return bits <= 4 and rows % 16 == 0 and (group or inputs) % 32 == 0
    if name == "int8_weight":
        return not group and inputs % 16 == 0
    if name == "int8_matmul":
        return not group and rows % 8 == 0 and inputs % 8 == 0
    return name == "bfloat16" or not group


def clips(name: str, bits: int, activation: int) -> bool:
    """Where a kernel is not to be taken, since the processor clips its sums."""
    return name == "int8" and (bits, activation) == (8, 8) and saturates()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [0, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("name", ["bfloat16", "int4", "int8_weight"])
def test_weight_only_kernels_agree_with_the_reference(name: str, group: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for (rows, inputs), bias in itertools.product(SHAPES, (False, True)):
        if group and inputs % group:
            continue
        layer = packed(nn.Linear(inputs, rows, bias=bias), LayerBits(bits, 16, group))
        assert (KERNELS[name].refuses(layer) is None) == taken(name, bits, group, rows, inputs), (rows, inputs)
        if KERNELS[name].refuses(layer) is None:
            for shape in INPUTS:
                x = torch.randn(*shape, inputs, generator=generator)
                assert error(layer, name, x) < KERNELS[name].tolerance, (rows, inputs, shape, bias)


@pytest.mark.parametrize("activation", range(2, 9))
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("name", ["int8", "int8_matmul"])
def test_integer_linear_layers_equal_the_reference(name: str, bits: int, activation: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for (rows, inputs), bias in itertools.product(SHAPES, (False, True)):
        layer = packed(nn.Linear(inputs, rows, bias=bias), LayerBits(bits, activation))
        fits = taken(name, bits, 0, rows, inputs) and not clips(name, bits, activation)
        assert (KERNELS[name].refuses(layer) is None) == fits, (rows, inputs)
        if KERNELS[name].refuses(layer) is None:
            for shape in INPUTS:
                x = torch.randn(*shape, inputs, generator=generator)
                assert error(layer, name, x) < 1e-5, (rows, inputs, shape, bias)


@pytest.mark.parametrize("activation", range(2, 9))
def test_integer_products_of_inputs_with_a_step_a_row(activation: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for (rows, inputs), bias in itertools.product([(16, 256), (8, 24)], (False, True)):
        layer = packed(nn.Linear(inputs, rows, bias=bias), LayerBits(4, activation, dynamic=True))
        assert {name for name, kernel in KERNELS.items() if kernel.refuses(layer) is None} == {"int8_matmul"}
        for shape in INPUTS:
            x = torch.randn(*shape, inputs, generator=generator) * torch.rand(*shape, 1, generator=generator)
            assert error(layer, "int8_matmul", x) < 1e-5, (rows, inputs, shape, bias)


#: Channels in and out, kernel, stride, padding, dilation, groups, padding mode.
CONVOLUTIONS = [
    (3, 5, 3, 1, 1, 1, 1),
    (4, 4, 3, 2, 1, 1, 4),
    (8, 6, 1, 1, 0, 1, 2),
    (4, 8, 5, 1, 4, 1, 1),
    (7, 7, (1, 3), (2, 1), (0, 1), 1, 7),
    (1, 3, 3, 1, 2, 2, 1),
    (5, 1, 2, 3, 0, 1, 1),
]


@pytest.mark.parametrize("activation", range(2, 9))
@pytest.mark.parametrize("bits", range(1, 9))
def test_integer_convolutions_equal_the_reference(bits: int, activation: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for (inputs, outputs, *settings), bias in itertools.product(CONVOLUTIONS, (False, True)):
        layer = packed(nn.Conv2d(inputs, outputs, *settings, bias=bias), LayerBits(bits, activation))
        assert (KERNELS["int8"].refuses(layer) is not None) == clips("int8", bits, activation)
        if clips("int8", bits, activation):
            continue
        for size in ((1, inputs, 9, 9), (3, inputs, 7, 10)):
            x = torch.randn(size, generator=generator)
            assert error(layer, "int8", x) < 1e-5, (settings, bias, size)
            assert error(layer, "int8", x.to(memory_format=torch.channels_last)) < 1e-5, (settings, bias, size)


@pytest.mark.parametrize("activation", range(2, 9))
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_largest_sums_are_not_clipped(bits: int, activation: int) -> None:
    """All weights of a row and all inputs at one end of their range: x86 without VNNI adds pairs in 16 bits."""
    low, high = weight_range(bits)
    layers = [nn.Linear(64, 16), nn.Conv2d(64, 16, 3, padding=1), nn.Conv2d(16, 16, 3, groups=16)]
    for layer, x in zip(
        layers, [torch.ones(40, 64), torch.ones(2, 64, 6, 6), torch.ones(2, 16, 6, 6)], strict=True
    ):
        integers = torch.full_like(layer.weight, high).to(torch.int8)
        integers[::2] = low
        bits_of = LayerBits(bits, activation)
        step = torch.ones(16)
        same = PackedModule.from_integers(
            layer, integers, step, bits_of, torch.tensor(0.031), torch.tensor(0)
        ).eval()
        for name in ("int8", "int8_matmul"):
            if KERNELS[name].refuses(same) is None:
                assert error(same, name, 100 * x) < 1e-5, (layer, name)


def test_a_processor_that_clips_sums_is_not_given_8_by_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for clipping in (True, False):
        monkeypatch.setattr("hq_plugin.nn.kernels.saturates", lambda clipping=clipping: clipping)
        for layer in (nn.Linear(16, 8), nn.Conv2d(4, 4, 3)):
            refused = {
                (bits, activation)
                for bits in range(1, 9)
                for activation in range(2, 9)
                if KERNELS["int8"].refuses(packed(layer, LayerBits(bits, activation))) is not None
            }
            assert refused == ({(8, 8)} if clipping else set())
            assert KERNELS["int8_matmul"].refuses(packed(nn.Linear(16, 8), LayerBits(8, 8))) is None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_large_inputs_are_quantized_in_pieces(memory_format: torch.memory_format) -> None:
    layer = packed(nn.Conv2d(8, 4, 1), LayerBits(4, 8))
    x = torch.randn(3, 8, 150, 150).to(memory_format=memory_format)
    assert x.numel() > CHUNK
    assert error(layer, "int8", x) < 1e-5
    wide = torch.randn(3, 8, 150, 300)[..., ::2]
    assert error(layer, "int8", wide) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_come_out_as_they_went_in(dtype: torch.dtype) -> None:
    for name in KERNELS:
        activation = 8 if name in ("int8", "int8_matmul") else 16
        layer = packed(nn.Linear(64, 32), LayerBits(4, activation)).to(dtype)
        assert error(layer, name, torch.randn(3, 64).to(dtype)) < 0.03


def test_kernels_refuse_what_they_cannot_do() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    for name, kernel in KERNELS.items():
        assert "plain" in (kernel.refuses(packed(Own(32, 32), LayerBits(4, 16))) or ""), name
        assert "plain" in (kernel.refuses(packed(nn.Conv1d(32, 32, 3), LayerBits(4, 8))) or ""), name
    assert "not quantized" in (KERNELS["int8"].refuses(packed(nn.Linear(4, 4), LayerBits(4, 16))) or "")
    same = packed(nn.Conv2d(4, 4, 3, padding="same"), LayerBits(4, 8))
    assert "padding" in (KERNELS["int8"].refuses(same) or "")


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("bfloat16", LayerBits(3, 16, 64)),
        ("int4", LayerBits(4, 16, 64)),
        ("int4", LayerBits(2, 16)),
        ("int8_weight", LayerBits(5, 16)),
    ],
)
def test_gpus_get_operators_that_torch_has_for_them(name: str, bits: LayerBits) -> None:
    """Without a GPU only shapes, dtypes and devices can be checked: by torch's own rules for its operators."""
    with FakeTensorMode(), torch.device("cuda"):
        layer = PackedModule.skeleton(nn.Linear(256, 64), bits)
        assert KERNELS["int8"].refuses(layer) is not None
        assert KERNELS[name].refuses(layer) is None
        for shape in ((3, 7, 256), (1, 256)):
            y = KERNELS[name].bind(layer)(torch.randn(shape))
            assert (y.shape, y.device.type, y.dtype) == (torch.Size((*shape[:-1], 64)), "cuda", torch.float32)


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_the_plain_integer_product_gets_the_sizes_that_cublas_takes(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    product, seen = torch._int_mm, []

    def watched(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a.shape, b.shape, a.dtype, b.dtype))
        return product(a, b)

    monkeypatch.setattr(torch, "_int_mm", watched)
    layer = packed(nn.Linear(24, 8), LayerBits(4, 8))
    assert error(layer, "int8_matmul", torch.randn(rows, 24)) < 1e-5
    assert seen == [((max(rows, 32), 24), (24, 8), torch.int8, torch.int8)]


def test_kernels_by_rows_follow_a_layer_that_moves() -> None:
    layer = packed(nn.Linear(64, 32), LayerBits(4, 16, 32))
    layer.set_kernel(ByRows(Bound(KERNELS["int4"], layer), Bound(KERNELS["bfloat16"], layer), 4))
    before = layer._kernel
    layer.double()
    assert layer._kernel is not before
    assert layer(torch.randn(2, 64).double()).dtype == torch.float64
    assert (layer._kernel.of(4).kernel.name, layer._kernel.of(5).kernel.name) == ("int4", "bfloat16")


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_pass_through_a_layer_that_has_a_kernel(name: str) -> None:
    quantized = name in ("int8", "int8_matmul")
    layer = packed(nn.Linear(64, 32), LayerBits(4, 8 if quantized else 16, 32 if name == "int4" else 0))
    if KERNELS[name].refuses(layer) is not None:
        pytest.skip(str(KERNELS[name].refuses(layer)))
    x = torch.randn(5, 64, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    expected, x.grad = x.grad, None
    layer.set_kernel(Bound(KERNELS[name], layer))
    layer(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert not layer(x.detach()).requires_grad


def test_a_batch_without_tokens_keeps_its_dimensions() -> None:
    layer = packed(nn.Linear(32, 16), LayerBits(4, 8))
    for name in KERNELS:
        if KERNELS[name].refuses(layer) is None:
            assert error(layer, name, torch.randn(2, 0, 32)) == 0


@torch.no_grad()
def test_a_convolution_takes_one_sample_without_a_batch() -> None:
    torch.manual_seed(0)
    layer = packed(nn.Conv2d(3, 8, 3, padding=1), LayerBits(5, 8))
    kernel = KERNELS["int8"]
    if kernel.refuses(layer) is not None:
        pytest.skip("oneDNN is not there")
    x = torch.randn(3, 9, 9)
    expected = layer(x)
    layer.set_kernel(Bound(kernel, layer))
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["int4", "bfloat16"])
def test_a_wider_bias_does_not_widen_the_result_under_autocast(name: str) -> None:
    layer, x = packed(nn.Linear(64, 32), LayerBits(4, 16, 32)), torch.randn(4, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert Bound(KERNELS[name], layer).run(x).dtype == layer(x).dtype == torch.bfloat16
