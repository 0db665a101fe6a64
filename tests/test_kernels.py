import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hq_plugin
from hq_plugin import HQWarning, KernelError, LayerBits, kernels
from hq_plugin.kernels import KERNELS, REFERENCE, Bound, choose_kernels, kernel_of, measure, use_kernel
from hq_plugin.nn import PackedModule
from hq_plugin.quantization import weight_range, weight_rows


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


def error(layer: PackedModule, name: str, x: Tensor) -> float:
    expected = layer(x)
    layer.set_kernel(Bound(KERNELS[name], layer))
    return float((layer(x) - expected).norm() / expected.norm())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["bfloat16", "int4", "int8_weight"]),
    st.integers(1, 8),
    st.sampled_from([0, 32, 64]),
    st.sampled_from([(16, 64), (48, 192), (7, 33), (33, 64), (5, 48), (32, 40)]),
    st.sampled_from([(1,), (5,), (2, 3)]),
    st.booleans(),
)
def test_weight_only_kernels_agree_with_the_reference(
    name: str, bits: int, group: int, shape: tuple[int, int], batch: tuple[int, ...], bias: bool
) -> None:
    group = group if shape[1] % (group or 1) == 0 else 0
    layer = packed(nn.Linear(shape[1], shape[0], bias=bias), LayerBits(bits, 16, group))
    reason = KERNELS[name].refuses(layer)
    if reason is not None:
        odd = shape[0] % 16 or shape[1] % 32
        assert (name == "int4" and (bits > 4 or odd)) or (name == "int8_weight" and (group or odd))
        return
    x = torch.randn(*batch, shape[1], generator=torch.Generator().manual_seed(1))
    assert error(layer, name, x) < KERNELS[name].tolerance


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(2, 8),
    st.sampled_from([(3, 5, 3, 1, 1, 1), (4, 4, 3, 2, 1, 4), (8, 6, 1, 1, 0, 2), (4, 8, 5, 1, 4, 1)]),
    st.booleans(),
)
def test_integer_convolutions_equal_the_reference(
    bits: int, activation: int, geometry: tuple[int, ...], bias: bool
) -> None:
    inputs, outputs, kernel, stride, padding, groups = geometry
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=bias)
    layer = packed(conv, LayerBits(bits, activation))
    x = torch.randn(2, inputs, 9, 9, generator=torch.Generator().manual_seed(1))
    assert error(layer, "int8", x) < 1e-5


@pytest.mark.parametrize("bits", range(1, 9))
def test_integer_linear_layers_equal_the_reference(bits: int) -> None:
    layer = packed(nn.Linear(33, 7), LayerBits(bits, 8))
    assert error(layer, "int8", torch.randn(2, 5, 33)) < 1e-5


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


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    return hq_plugin.quantize(
        made, "4.5bit", [torch.randn(8, 64)], effort="smoke", progress=False, activation_bits=8
    )


def test_the_fastest_is_chosen_kept_in_a_file_and_read_again(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(8, 64)
    expected = model(x)
    file = tmp_path / "folder" / "kernels.json"
    found = choose_kernels(model, x, cache=file)
    assert set(found) == {"0", "2", "4"}
    for name, choice in found.items():
        assert kernel_of(model.get_submodule(name)) == choice.kernel  # type: ignore[arg-type]
        assert set(choice.milliseconds) | set(choice.refused) == {REFERENCE, *KERNELS}
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    # What the file says is believed, and not measured again.
    content = json.loads(file.read_text())
    for entry in content[kernels.machine()].values():
        entry["kernel"] = "int8"
    file.write_text(json.dumps(content))
    monkeypatch.setattr(kernels, "measure", None)
    choose_kernels(model, x, cache=file)
    assert {kernel_of(layer) for layer in model if isinstance(layer, PackedModule)} == {"int8"}  # type: ignore[union-attr, attr-defined]


def test_a_damaged_file_is_measured_again(model: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    for text in ("{", "[]", json.dumps({kernels.machine(): {"key": 3}})):
        file.write_text(text)
        assert choose_kernels(model, torch.randn(1, 64), cache=file)
        assert kernels.machine() in json.loads(file.read_text())


def test_a_kernel_that_is_wrong_here_is_passed_over(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(KERNELS["int8"]), "bind", lambda self, layer: lambda x: layer(x) + 1)
    with pytest.warns(HQWarning, match="wrong on this machine"):
        found = choose_kernels(model, torch.randn(1, 64), cache=tmp_path / "kernels.json")
    assert all("wrong" in choice.refused["int8"] for choice in found.values())

    def fail(self: object, layer: object) -> object:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(type(KERNELS["int8"]), "bind", fail)
    with pytest.warns(HQWarning, match="no such instruction"):
        assert measure(model[0], torch.randn(1, 64)).kernel == REFERENCE  # type: ignore[index]


def test_kernels_survive_moves_and_undo(model: nn.Module) -> None:
    x = torch.randn(4, 64)
    expected = model(x)
    assert use_kernel(model, "int8") == ["0", "2", "4"]
    close = model(x)
    assert kernel_of(model.to("cpu")[0]) == "int8"  # type: ignore[index]
    assert torch.equal(model(x), close)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_kernel(model, REFERENCE)
    assert torch.equal(model(x), expected)
    use_kernel(model, "int8")
    model.load_state_dict(state)
    assert torch.equal(model(x), expected)


def test_no_dequantized_weight_stays_beside_a_kernel(model: nn.Module) -> None:
    model(torch.randn(4, 64))
    use_kernel(model, "int8")
    model(torch.randn(4, 64))
    layer = model[0]  # type: ignore[index]
    assert layer._cached is None
    assert layer.weight.shape == (64, 64)
    assert layer._cached is None


def test_bad_input(model: nn.Module) -> None:
    with pytest.raises(KernelError, match=r"no kernel 'int3'.*int4"):
        use_kernel(model, "int3")
    with pytest.raises(KernelError, match="no packed layer"):
        choose_kernels(nn.Linear(2, 2), torch.randn(1, 2))
