import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import hq_plugin
from hq_plugin import HQWarning, KernelError, LayerBits, kernels
from hq_plugin.kernels import choose_kernels, kernel_of, measure, relative_error, use_kernel
from hq_plugin.nn import PackedModule, cache_weights, packed_modules
from hq_plugin.nn.kernels import KERNELS, REFERENCE, Bound, ByRows
from hq_plugin.timing import OtherMemory, machine
from tests.nn.test_kernels import packed


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
    for entry in content[machine()].values():
        entry["kernel"] = "int8"
    file.write_text(json.dumps(content))
    monkeypatch.setattr(kernels, "measure", None)
    choose_kernels(model, x, cache=file)
    assert {kernel_of(layer) for layer in model if isinstance(layer, PackedModule)} == {"int8"}  # type: ignore[union-attr, attr-defined]


def pretend(monkeypatch: pytest.MonkeyPatch, milliseconds: dict[str, tuple[float, float]]) -> None:
    """Lets kernels take given times, for one row and for many; all others take for ever."""

    def measured(layer: PackedModule, x: torch.Tensor, others: OtherMemory) -> kernels.Choice:
        times = {name: ms[x.shape[0] > 1] for name, ms in milliseconds.items()}
        return kernels.Choice(min(times, key=lambda name: times[name]), times, {})

    monkeypatch.setattr(kernels, "measure", measured)


def linear(
    monkeypatch: pytest.MonkeyPatch, **milliseconds: tuple[float, float]
) -> tuple[nn.Module, kernels.Choice]:
    """A layer that was measured on 64 rows."""
    pretend(monkeypatch, milliseconds)
    model = nn.Sequential(packed(nn.Linear(64, 32), LayerBits(4, 16, 32)))
    return model, choose_kernels(model, torch.randn(64, 64), cache=Path("/dev/null/none"))["0"]


def test_one_row_and_many_have_a_kernel_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model, choice = linear(monkeypatch, dequantized=(3.0, 30.0), int4=(1.0, 20.0), bfloat16=(2.0, 10.0))
    layer = model[0]  # type: ignore[index]
    assert (choice.kernel, choice.one_row.kernel) == ("bfloat16", "int4")  # type: ignore[union-attr]
    # 8 is as far from 1 as from 64.
    assert [kernel_of(layer, rows) for rows in (1, 8, 9, 64, 1000, None)] == ["int4"] * 2 + ["bfloat16"] * 4
    ran = []
    for bound in (layer._kernel.few, layer._kernel.many):
        run, name = bound.run, bound.kernel.name
        monkeypatch.setattr(bound, "run", lambda x, run=run, name=name: ran.append(name) or run(x))
    expected = layer.weight.detach()
    for shape, name in (((1, 64), "int4"), ((1, 1, 64), "int4"), ((2, 4, 64), "int4"), ((3, 3, 64), "bfloat16")):
        x = torch.randn(shape)
        torch.testing.assert_close(model(x), x @ expected.T + layer.bias, rtol=3e-2, atol=3e-2)
        assert ran.pop() == name
    assert layer._cached is None


def test_a_second_kernel_must_be_worth_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, choice = linear(monkeypatch, dequantized=(3.0, 30.0), int4=(1.0, 10.3), bfloat16=(2.0, 10.0))
    assert not isinstance(model[0]._kernel, ByRows)  # type: ignore[index]
    assert (choice.kernel, choice.one_row.kernel) == ("int4", "int4")  # type: ignore[union-attr]
    model, choice = linear(monkeypatch, dequantized=(3.0, 30.0), int4=(1.0, 20.0), bfloat16=(1.02, 10.0))
    assert (choice.kernel, choice.one_row.kernel) == ("bfloat16", "bfloat16")  # type: ignore[union-attr]


def test_the_reference_may_be_one_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = linear(monkeypatch, dequantized=(3.0, 10.0), int4=(1.0, 20.0))
    layer = model[0]  # type: ignore[index]
    x = torch.randn(64, 64)
    assert torch.equal(model(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer._cached is not None, "many rows read it again"
    assert kernel_of(layer, 1) == "int4"
    assert kernel_of(layer) == REFERENCE
    moved = model.double()
    torch.testing.assert_close(
        moved(x[:1].double()).float(), model(x[:2].double())[:1].float(), rtol=3e-2, atol=3e-2
    )
    assert (kernel_of(layer, 1), kernel_of(layer)) == ("int4", REFERENCE)


def test_what_the_other_layers_have_is_read_between_two_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    monkeypatch.setattr(OtherMemory, "read", lambda others: reads.append(others.size))
    small = nn.Sequential(packed(nn.Linear(64, 64), LayerBits(4, 16)))
    large = nn.Sequential(*small, packed(nn.Linear(64, 512), LayerBits(8, 16)))
    choose_kernels(small, torch.randn(4, 64), cache=tmp_path / "k.json")
    assert set(reads) == {4096}
    assert len(reads) >= 2 * 15  # one row and four, at least the reference each
    choose_kernels(large, torch.randn(4, 64), cache=tmp_path / "k.json")
    assert set(reads) == {4096, 65536}


def test_layers_are_measured_on_one_row_as_well(tmp_path: Path) -> None:
    model = nn.Sequential(
        packed(nn.Conv2d(3, 4, 3), LayerBits(4, 8)), nn.Flatten(), packed(nn.Linear(64, 8), LayerBits(4, 16))
    )
    found = choose_kernels(model, torch.randn(5, 3, 6, 6), cache=tmp_path / "kernels.json")
    assert found["0"].one_row is None
    assert found["2"].one_row is not None
    assert set(found["2"].one_row.milliseconds) >= {REFERENCE, "bfloat16", "int8_weight"}
    assert found["2"] == choose_kernels(model, torch.randn(5, 3, 6, 6), cache=tmp_path / "kernels.json")["2"]
    assert choose_kernels(model, torch.randn(1, 3, 6, 6), cache=tmp_path / "kernels.json")["2"].one_row is None
    entries = json.loads((tmp_path / "kernels.json").read_text())[machine()]
    assert len(entries) == 4
    assert all(math.isfinite(ms) for entry in entries.values() for ms in entry["milliseconds"].values())


def test_every_layer_of_a_model_has_a_choice(model: nn.Module, tmp_path: Path) -> None:
    assert set(choose_kernels(model, torch.randn(2, 64), cache=tmp_path / "k.json")) == set(packed_modules(model))


def test_a_damaged_file_is_measured_again(model: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    for text in ("{", "[]", json.dumps({machine(): {"key": 3}}), "known"):
        if text == "known":  # what was measured without its times
            kept = json.loads(file.read_text())
            for choice in kept[machine()].values():
                choice["milliseconds"] = {}
            text = json.dumps(kept)
        file.write_text(text)
        assert choose_kernels(model, torch.randn(1, 64), cache=file)
        assert machine() in json.loads(file.read_text())


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


def test_a_kernel_that_keeps_a_float_weight_goes_with_the_cache() -> None:
    layer = packed(nn.Linear(64, 64), LayerBits(4, 16))
    for bound in (Bound(KERNELS["bfloat16"], layer), ByRows(None, Bound(KERNELS["bfloat16"], layer), 4)):
        layer.set_kernel(bound)
        cache_weights(layer, False)
        assert layer._kernel is None
        assert use_kernel(layer, "bfloat16") == []
        cache_weights(layer, True)
    assert use_kernel(layer, "bfloat16") == [""]
    use_kernel(layer, "int4")
    cache_weights(layer, False)
    assert kernel_of(layer) == "int4"


def test_errors_are_seen_in_half_precision_as_well() -> None:
    layer, x = packed(nn.Linear(4096, 1024), LayerBits(4, 16)).half(), torch.randn(64, 4096).half()
    assert layer(x).isfinite().all()
    assert relative_error(torch.zeros(64, 1024).half(), layer(x), layer, x) > 0.5


def test_bad_input(model: nn.Module) -> None:
    with pytest.raises(KernelError, match=r"no kernel 'int3'.*int4"):
        use_kernel(model, "int3")
    with pytest.raises(KernelError, match="no packed layer"):
        choose_kernels(nn.Linear(2, 2), torch.randn(1, 2))
