import json
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hq_plugin as hq
from hq_plugin import (
    ArtifactError,
    Budget,
    BudgetError,
    ConfigError,
    EngineError,
    HQWarning,
    Profile,
    profiling,
)
from hq_plugin.batch import Batch
from hq_plugin.errors import ArtifactPathError
from hq_plugin.integrations.onnxruntime.timing import layer_milliseconds, model_milliseconds
from hq_plugin.kernels import kernel_of
from hq_plugin.nn import packed_modules
from hq_plugin.nn.kernels import KERNELS, REFERENCE
from hq_plugin.nn.saturation import saturates
from hq_plugin.policy import LayerBits
from hq_plugin.profiles import engine_versions, signature, width
from hq_plugin.profiling import _fit, first_samples, random_layer
from hq_plugin.result import versions
from hq_plugin.sites import find_sites
from hq_plugin.storage import sealed
from hq_plugin.timing import machine
from tests.conftest import TinyNet

CPU = torch.device("cpu")


@pytest.fixture
def options() -> dict[str, object]:
    return {"effort": "smoke", "progress": False, "weight_bits": (2, 4, 8), "activation_bits": (8, 16)}


@pytest.fixture
def made(trained: nn.Module, batches: list[tuple[Tensor, Tensor]], options: dict[str, object]) -> Profile:
    return hq.profile(trained, batches, batch=4, target="torch", **options)


def with_times(profile: Profile, milliseconds: Callable[[str, str], float], rest: float, slope: float) -> Profile:
    """A profile with other times, by layer and width; a second kernel is always slower."""
    layers = {
        name: {key: {"fast": milliseconds(name, key), "slow": milliseconds(name, key) + 1} for key in widths}
        for name, widths in profile.layers.items()
    }
    slopes = {"8": slope, "16": slope}
    return Profile(**{**vars(profile), "layers": layers, "rest": rest, "slopes": slopes, "error": 0.0})


def bits_of(key: str) -> float:
    """Bits of weight and activation together."""
    return float(sum(map(int, key.split(",")[:2])))


def slow_and_fast(profile: Profile) -> Profile:
    """A profile whose times are 1 ms for each bit of weight and activation."""
    return with_times(profile, lambda name, key: bits_of(key), 5.0, 2.0)


def test_every_layer_width_and_kernel_is_measured(made: Profile) -> None:
    assert len(made.layers) == 4
    assert all(set(times) == {f"{w},{a}" for w in (2, 4, 8) for a in (8, 16)} for times in made.layers.values())
    for name, widths in made.layers.items():
        for key, kernels in widths.items():
            assert all(ms > 0 for ms in kernels.values())
            assert REFERENCE in kernels
            assert ("int8" in kernels) == (key.endswith(",8") and not (key == "8,8" and saturates()))
            assert ("bfloat16" in kernels) == ("Linear" in name and key.endswith(",16"))
    assert (made.batch, made.target) == (4, "torch")
    assert made.machine == machine()
    assert made.versions == versions()


def test_models_are_timed_with_the_ranges_of_their_inputs(
    trained: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    options: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # ONNX Runtime drops a ReLU6 before a quantizer whose range ends at 6 and fuses its neighbours, and no other.
    timed: list[nn.Module] = []
    monkeypatch.setattr(profiling, "_torch_model", lambda model, batch: timed.append(model) or 1.0)
    hq.profile(trained, batches, batch=4, target="torch", **{**options, "activation_bits": 8})
    assert len(timed) > 1
    for model in timed:
        steps = [float(layer.activation_step) for layer in packed_modules(model).values()]
        assert len(set(steps)) == len(steps)


def test_a_profile_is_saved_and_read(made: Profile, tmp_path: Path) -> None:
    file = made.save(tmp_path / "folder" / "p.json")
    assert Profile.load(file) == made
    with pytest.raises(ArtifactPathError, match="cannot be written"):
        made.save(file / "p.json")


def test_latency_is_a_budget_that_is_kept(
    made: Profile, trained: nn.Module, batches: list[tuple[Tensor, Tensor]], options: dict[str, object]
) -> None:
    profile = slow_and_fast(made)
    # 4 layers of 2+8 bits cost 10 each: 2 * 40 + 5 at least, 2 * 96 + 5 at most.
    budget = Budget(latency_ms=125, batch=4)
    small = hq.quantize(trained, budget, batches, profile=profile, **options)  # type: ignore[arg-type]
    result: hq.Result = small.hq  # type: ignore[assignment]
    spent = 2 * sum(bits.weight + bits.activation for bits in result.policy.values()) + 5
    assert result.costs.latency_ms == spent <= 125
    assert result.used == {"latency_ms": pytest.approx(spent / 125)}
    assert spent >= 0.97 * 125
    # The model runs on the kernels that were promised.
    kernels = {kernel_of(layer) for layer in packed_modules(small).values()}
    assert kernels <= {REFERENCE, *KERNELS}
    with pytest.raises(BudgetError, match=r'takes 85 ms \(5 of them in what stays float\). Ask for "86.7ms"'):
        hq.quantize(trained, Budget(latency_ms=80, batch=4), batches, profile=profile, **options)  # type: ignore[arg-type]


def test_without_a_profile_this_machine_is_measured(
    trained: nn.Module, batches: list[tuple[Tensor, Tensor]], options: dict[str, object]
) -> None:
    small = hq.quantize(trained, "1000s", batches, target="torch", **options)
    assert 0 < small.hq.costs.latency_ms < 1e6  # type: ignore[union-attr]


def test_a_layer_that_is_faster_on_a_float_input_gets_one(
    made: Profile, trained: nn.Module, batches: list[tuple[Tensor, Tensor]], options: dict[str, object]
) -> None:
    # For one layer, quantizing the input takes longer than it saves; the others are as fast as they are narrow.
    slow = next(name for name in made.layers if "[8, 1, 3, 3]" in name and name.endswith("inputs=512"))
    profile = with_times(
        made, lambda name, key: bits_of(key) + 100 * (name == slow and key.endswith(",8")), 5.0, 1.0
    )
    # 3 layers of 2+8, and one of 2+16.
    fastest = 3 * 10 + 18 + 5
    small = hq.quantize(trained, Budget(latency_ms=fastest, batch=4), batches, profile=profile, **options)  # type: ignore[arg-type]
    result: hq.Result = small.hq  # type: ignore[assignment]
    assert result.costs.latency_ms == fastest
    assert {name: bits.activation for name, bits in result.policy.items()} == {
        "stem": 8,
        "depthwise": 16,
        "pointwise": 8,
        "head": 8,
    }
    with pytest.raises(BudgetError, match=f"takes {fastest} ms"):
        hq.quantize(trained, Budget(latency_ms=fastest - 1, batch=4), batches, profile=profile, **options)  # type: ignore[arg-type]
    # Time that is left is not spent on what gains nothing.
    small = hq.quantize(trained, Budget(latency_ms=150, batch=4), batches, profile=profile, **options)  # type: ignore[arg-type]
    assert small.hq.policy["depthwise"].activation == 16  # type: ignore[union-attr]


def test_rest_and_slopes_come_from_what_was_measured() -> None:
    rest, slopes = _fit([{"8": 1.0}, {"8": 2.0}, {"8": 3.0}], [7.0, 9.0, 11.0])
    assert (rest, slopes["8"]) == (pytest.approx(5.0, rel=0.1), pytest.approx(2.0, rel=0.1))
    # Layers between which integers are kept take less than alone, others more.
    sums = [{"8": 10.0, "16": 1.0}, {"8": 14.0, "16": 1.0}, {"16": 12.0}, {"16": 15.0}]
    rest, slopes = _fit(sums, [0.5 * each.get("8", 0.0) + 1.5 * each["16"] + 2 for each in sums])
    assert (slopes["8"], slopes["16"]) == (pytest.approx(0.5, rel=0.05), pytest.approx(1.5, rel=0.05))
    # Sums that hardly differ tell no slope (that of the least squared relative error would be 200).
    rest, slopes = _fit([{"8": 1.0}, {"8": 1.01}], [3.0, 5.0])
    assert (rest + slopes["8"], slopes["8"]) == (pytest.approx(3.53, rel=0.01), pytest.approx(1.2, rel=0.2))
    # A rest below nothing becomes a slope: without it this would be 0.8, and -3.
    rest, slopes = _fit([{"8": 10.0}, {"8": 15.0}], [5.0, 9.0])
    assert (rest, slopes["8"]) == (pytest.approx(0.0, abs=1e-6), pytest.approx(0.55, rel=0.05))


def test_times_that_do_not_add_up_are_told(
    made: Profile,
    trained: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    options: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rough = Profile(**{**vars(slow_and_fast(made)), "error": 0.4})
    with pytest.warns(HQWarning, match=r"took 40% more or less.*activation_bits=8"):
        hq.quantize(trained, Budget(latency_ms=180, batch=4), batches, profile=rough, **options)  # type: ignore[arg-type]

    # All layers take the same alone; together more on float inputs, and most where inputs differ.
    def whole(model: nn.Module, batch: Batch) -> float:
        inputs = {layer.bits.activation for layer in packed_modules(model).values()}
        return {8: 2.0, 16: 4.0}[inputs.pop()] if len(inputs) == 1 else 6.0

    timers = (lambda layer, x: {"any": 1.0}), whole
    monkeypatch.setattr(profiling, "_timers", lambda *given: timers)
    found = hq.profile(trained, batches, target="torch", **options)  # type: ignore[arg-type]
    ways = [found.milliseconds({"8": 4.0}), found.milliseconds({"16": 4.0})]
    assert ways == [pytest.approx(2.0, rel=0.02), pytest.approx(4.0, rel=0.02)]
    assert found.error == pytest.approx(1.0, rel=0.1)


def test_a_profile_of_something_else(
    made: Profile, trained: nn.Module, batches: list[tuple[Tensor, Tensor]], options: dict[str, object]
) -> None:
    four = Budget(latency_ms=180, batch=4)

    def quantize(
        profile: Profile,
        budget: str | Budget = four,
        data: list[tuple[Tensor, Tensor]] = batches,
        **changed: object,
    ) -> nn.Module:
        return hq.quantize(trained, budget, data, profile=profile, **{**options, **changed})  # type: ignore[arg-type]

    foreign = Profile(**{**vars(slow_and_fast(made)), "machine": "another", "versions": {"torch": "1.0"}})
    with pytest.warns(HQWarning, match=r"another machine \(another.*torch 1.0 \(now"):
        quantize(foreign)
    with pytest.raises(ConfigError, match="4 samples a forward, the budget of 1"):
        quantize(made, "180ms")
    with pytest.raises(ConfigError, match=r"no time for 'stem' at W3.*hq-plugin profile"):
        quantize(made, weight_bits=(3, 8))
    larger = [(nn.functional.pad(x, (2, 2, 2, 2)), y) for x, y in batches]
    with pytest.raises(ConfigError, match=r"'stem' on inputs of 144 numbers a sample.*another size.*data of that"):
        quantize(made, data=larger)
    other = Profile(**{**vars(made), "target": "onnxruntime"})
    for target in ("storage", "torch"):
        with pytest.raises(ConfigError, match=rf"target='onnxruntime', and target='{target}'.*--target torch"):
            quantize(other, target=target)


def test_a_profile_for_onnxruntime_knows_its_version(
    trained: nn.Module, batches: list[tuple[Tensor, Tensor]], options: dict[str, object]
) -> None:
    made = hq.profile(trained, batches, target="onnxruntime", **{**options, "weight_bits": 8, "activation_bits": 8})  # type: ignore[arg-type]
    assert made.versions["onnxruntime"] == metadata.version("onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.warn_if_foreign(CPU)
    with pytest.warns(HQWarning, match=r"another onnxruntime 0\.1 \(now"):
        Profile(**{**vars(made), "versions": {**made.versions, "onnxruntime": "0.1"}}).warn_if_foreign(CPU)


def test_a_profile_knows_its_device(made: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    gpu = torch.device("cuda")
    with pytest.warns(HQWarning, match=r"another machine.*this is .*, on NVIDIA H200\)"):
        made.warn_if_foreign(gpu)
    there = Profile(**{**vars(made), "machine": machine(gpu)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        there.warn_if_foreign(gpu)
        # ONNX Runtime runs on the processor, wherever the model is.
        Profile(
            **{**vars(made), "target": "onnxruntime", "versions": engine_versions("onnxruntime")}
        ).warn_if_foreign(gpu)
    with pytest.warns(HQWarning, match="another machine"):
        there.warn_if_foreign(CPU)


def test_an_engine_that_is_not_installed(
    trained: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    options: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "hq_plugin.integrations.onnxruntime.timing")
    for call in (
        lambda: hq.profile(trained, batches, target="onnxruntime", **options),  # type: ignore[arg-type]
        lambda: hq.quantize(trained, "8ms", batches, target="onnxruntime", **options),  # type: ignore[arg-type]
    ):
        with pytest.raises(EngineError, match=r"onnxruntime.*hq-plugin\[onnx\]"):
            call()


def test_a_damaged_file(made: Profile, tmp_path: Path) -> None:
    good = made.save(tmp_path / "p.json")
    data = json.loads(good.read_text())
    layer = next(iter(data["layers"]))
    for wrong in (
        "{",
        "[]",
        json.dumps(sealed({**data, "format": "other"})),
        json.dumps(sealed({**data, "version": 99})),
        json.dumps(sealed({**data, "layers": {layer: {"2,8": 1.0}}})),
        json.dumps(sealed({**data, "layers": {layer: {"2,8": {}}}})),
        json.dumps(sealed({**data, "layers": {layer: {"2,8": {"int8": "fast"}}}})),
        json.dumps(sealed({**data, "layers": {layer: {"2,8": {"int8": -1}}}})),
        json.dumps(sealed({**data, "rest": None})),
    ):
        good.write_text(wrong)
        with pytest.raises(ArtifactError):
            Profile.load(good)
    with pytest.raises(ArtifactError, match="cannot be read"):
        Profile.load(tmp_path / "nothing.json")


def test_energy_is_a_budget(
    trained: nn.Module, batches: list[tuple[Tensor, Tensor]], options: dict[str, object]
) -> None:
    session = hq.meta_train(trained, batches, **options)  # type: ignore[arg-type]
    narrow, wide = (session.costs.costs(session.space.top * index).energy_uj for index in (0, 1))
    # By hand, for all at 8 bits and float inputs, which count as 16.
    sites = list(session.space.table)
    picojoules = sum(site.macs * (0.2 * 8 * 16 / 64 + 0.1) for site in sites)
    picojoules += float(session.costs.weight_bytes[:, -1, -1].sum()) * 8 * 20
    assert wide == pytest.approx(picojoules * 1e-6)
    budget = Budget(energy_uj=(narrow + wide) / 2)
    assert session.search(budget).costs.energy_uj <= (narrow + wide) / 2
    with pytest.raises(BudgetError, match="microjoules"):
        session.search(Budget(energy_uj=narrow / 2))
    assert Budget.parse("50uJ") == Budget(energy_uj=50)
    assert Budget.parse("8 ms + 3bit") == Budget(weight_bits=3, latency_ms=8)
    with pytest.raises(BudgetError, match="batch"):
        Budget(latency_ms=1, batch=0)


def test_layers_and_models_are_timed_in_onnxruntime(trained: nn.Module) -> None:
    x = torch.randn(2, 1, 8, 8)
    layer = random_layer(trained.get_submodule("stem"), LayerBits(4, 8))
    (milliseconds,) = layer_milliseconds(layer, x).values()
    assert milliseconds > 0
    assert layer_milliseconds(layer, x) == layer_milliseconds(layer, x) == {"DequantizeLinear": milliseconds}
    narrow, wide = (random_layer(trained.get_submodule("stem"), LayerBits(bits, 8)) for bits in (3, 8))
    assert layer_milliseconds(narrow, x) == {"DequantizeLinear": milliseconds}
    # Exact sums of 8 by 8 bits are slower on some processors, and timed apart.
    assert layer_milliseconds(wide, x) != {"DequantizeLinear": milliseconds}
    small = hq.quantize(trained, "5bit", [x], effort="smoke", progress=False)
    assert model_milliseconds(small, Batch((x,), {}, None, 2)) > 0


def test_samples_are_repeated_and_names_tell_layers_apart() -> None:
    batch = Batch((torch.arange(3).view(3, 1),), {"scale": torch.tensor(2.0)}, None, 3)
    taken = first_samples(batch, 5)
    assert taken.args[0].flatten().tolist() == [0, 1, 2, 0, 1]
    assert taken.kwargs["scale"].dim() == 0
    sites = list(find_sites(TinyNet().eval(), lambda m: m(torch.randn(2, 1, 8, 8)), 2))
    assert len({signature(site) for site in sites}) == 4
    assert (width(LayerBits(3, 8)), width(LayerBits(3, 16, 64))) == ("3,8", "3,16,64")
