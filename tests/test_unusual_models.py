"""Models that do what most do not: the result is what is reported, and the user's model stays as it was."""

import copy
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import hq_plugin as hq
from hq_plugin import ConfigError, HQWarning, ModelError, PolicyError
from hq_plugin.nn import packed_modules
from hq_plugin.storage import TENSOR_FILE

OPTIONS: dict[str, Any] = {"effort": "smoke", "meta_steps": 4, "finetune_steps": 4, "progress": False}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def vectors(width: int = 16) -> list[Tensor]:
    return [torch.randn(16, width) for _ in range(8)]


def pictures() -> list[Tensor]:
    return [torch.randn(16, 3, 8, 8) for _ in range(8)]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


def cnn() -> nn.Sequential:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    made = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10)).eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return made


def off(small: nn.Module, model: nn.Module, x: Any) -> float:
    """Returns the relative error of a result's outputs."""
    with torch.no_grad():
        wanted, found = model(x), small(x)
    return float((found - wanted).norm() / wanted.norm())


def test_hooks_of_layers_run_once(tmp_path: Path) -> None:
    model, calls = mlp(), []
    model[2].register_forward_hook(lambda module, args, output: calls.append(0) or output + 1)
    model[4].register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)
    small = hq.quantize(model, "9bit", vectors(), weight_bits=8, **OPTIONS)
    x = torch.randn(4, 16)
    calls.clear()
    assert off(small, model, x) < 0.05
    assert len(calls) == 2  # the model's, and the result's
    again = hq.load(hq.save(small, tmp_path / "small"), mlp())
    again[2].register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(again(x), small(x))


def test_a_layer_whose_forward_was_replaced_stays_float() -> None:
    model = mlp()
    model[2].forward = types.MethodType(lambda self, x: F.linear(x, self.weight, self.bias), model[2])
    small = hq.quantize(model, "9bit", vectors(), weight_bits=8, **OPTIONS)
    assert list(packed_modules(small)) == ["0", "4"]
    [left] = [layer for layer in small.hq.float_layers if layer["name"] == "2"]
    assert "its forward was replaced" in left["reason"]
    policy = hq.HybridPolicy({"2": hq.LayerBits(4, 8)})
    with pytest.raises(PolicyError, match="'2', which cannot be quantized: its forward was replaced"):
        hq.torch_ao.prepare(model, policy)


class ZeroCentred(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, 1 + self.weight, self.bias, eps=self.eps)


class OfTheBatch(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True, eps=self.eps)


@pytest.mark.parametrize("kind", ["tied", "statistics", "bias", "zero-centred", "of the batch", "no bias"])
def test_batchnorms_that_cannot_be_folded_stay(kind: str, tmp_path: Path) -> None:
    model = cnn()
    if kind == "tied":
        model[4].weight, model[4].bias = model[1].weight, model[1].bias
    elif kind == "statistics":
        model[4].running_mean, model[4].running_var = model[1].running_mean, model[1].running_var
    elif kind == "bias":
        model[3].bias = model[4].bias
    elif kind == "no bias":
        model[4].bias = None
    else:
        model[4].__class__ = ZeroCentred if kind == "zero-centred" else OfTheBatch
    small = hq.quantize(model, "9bit", pictures(), weight_bits=8, **OPTIONS)
    assert off(small, model, pictures()[0]) < 0.1
    hq.save(small, tmp_path / "small")
    assert small.hq.size == bytes_of(tmp_path / "small")


def bytes_of(directory: Path) -> int:
    return sum(t.numel() * t.element_size() for t in load_file(directory / TENSOR_FILE).values())


def test_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    for channels in (8, 1):
        model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.Flatten(), nn.LazyLinear(10))
        model.eval()(pictures()[0])
        small = hq.quantize(model, "4bit", pictures(), **OPTIONS)
        out = hq.save(small, tmp_path / str(channels))
        assert small.hq.size == bytes_of(out)
        assert (out / TENSOR_FILE).stat().st_size > small.hq.size
        x = pictures()[0]
        torch.testing.assert_close(hq.load(out, model)(x), small(x), rtol=0, atol=0)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        x /= 0.5
        return self.net(x)


def test_a_model_that_changes_its_inputs_in_place() -> None:
    data = vectors()
    before = [x.clone() for x in data]
    small = hq.quantize(InPlace().eval(), "9bit", data, weight_bits=8, **OPTIONS)
    assert all(torch.equal(x, kept) for x, kept in zip(data, before, strict=True))
    assert small.hq.kl < 1e-2


def test_an_embedding_that_renormalises_its_rows_keeps_the_users() -> None:
    model = nn.Sequential(nn.Embedding(20, 16, max_norm=0.5), nn.Flatten(), nn.Linear(64, 10)).eval()
    before = model[0].weight.clone()
    hq.quantize(model, "9bit", [torch.randint(20, (16, 4)) for _ in range(8)], weight_bits=8, **OPTIONS)
    assert torch.equal(model[0].weight, before)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("turn", torch.linalg.qr(torch.randn(16, 16))[0])
        self.register_buffer("back", self.turn.t())
        self.register_buffer("first", self.turn[:4])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x @ self.turn @ self.back)


def test_a_session_keeps_views_of_one_memory(tmp_path: Path) -> None:
    model, data = Views().eval(), vectors()
    session = hq.meta_train(model, data, **OPTIONS)
    policy = session.search("4bit").policy
    session.save(tmp_path / "session")
    loaded = hq.load_session(tmp_path / "session", model, data)
    for name in ("turn", "back", "first"):
        assert torch.equal(loaded.network.get_buffer(name), session.network.get_buffer(name))
    assert loaded.search("4bit").policy.to_json() == policy.to_json()


def test_a_name_leaves_all_that_is_in_it_out() -> None:
    model = nn.Sequential()
    model.add_module("body", mlp()[:4])
    model.add_module("head", nn.Linear(32, 10))
    small = hq.quantize(model.eval(), "9bit", vectors(), weight_bits=8, exclude=["body"], **OPTIONS)
    assert list(packed_modules(small)) == ["head"]


class Scaled(nn.Linear):
    def forward(self, input: Tensor, scale: Any = 1.0) -> Tensor:  # type: ignore[override]
        return F.linear(input, self.weight, self.bias) * scale


class ByKeyword(nn.Module):
    def __init__(self, scale: Any) -> None:
        super().__init__()
        self.first, self.second, self.scale = Scaled(16, 16), nn.Linear(16, 10), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(input=x, scale=self.scale))


@pytest.mark.parametrize("scale", [2.0, torch.tensor(100.0)])
def test_only_the_input_of_a_layer_is_quantized(scale: Any) -> None:
    model = ByKeyword(scale).eval()
    small = hq.quantize(model, "9bit", vectors(), weight_bits=8, **OPTIONS)
    assert off(small, model, torch.randn(8, 16)) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_callers_default_dtype_does_not_matter(dtype: torch.dtype, tmp_path: Path) -> None:
    model, data, x = mlp(), vectors(), torch.randn(8, 16)
    small = hq.quantize(model, "4bit", data, **OPTIONS)
    out = hq.save(small, tmp_path / "small")
    torch.set_default_dtype(dtype)
    try:
        again = hq.quantize(model, "4bit", data, **OPTIONS)
        loaded = hq.load(out, model)
        hq.choose_kernels(hq.load(out, model), x, cache=tmp_path / "kernels.json")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(loaded(x), small(x))
    assert off(again, model, x) < 1.2 * off(small, model, x)


def test_what_another_session_found_is_refused_before_training() -> None:
    model, data = mlp(), vectors()
    session = hq.meta_train(model, data, **OPTIONS)
    for other in ({"group_size": 16}, {"exclude": ["4"]}):
        found = hq.meta_train(model, data, **OPTIONS, **other).search("4bit")
        with pytest.raises(PolicyError):
            session.finetune(found)
    with pytest.warns(HQWarning, match=r"exceeds the budget 2\.5bit: it uses \d+% of weight_bits"):
        small = session.finetune(session.search("6bit"), budget="2.5bit")
    assert small.hq.used["weight_bits"] > 1
    given = session.finetune(session.search("4bit").policy, budget="4bit")
    assert 0.9 < given.hq.used["weight_bits"] <= 1


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("mask", torch.zeros(10).index_fill(0, torch.tensor([3]), -torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.mask


def test_classes_that_are_ruled_out() -> None:
    small = hq.quantize(Masked().eval(), "6bit", vectors(), **OPTIONS)
    assert 0 <= small.hq.kl < 0.1


class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, t: Tensor, x: Tensor, cache: Tensor | None = None) -> Tensor:
        return self.net(x * t)


def test_a_number_before_the_samples_and_an_input_of_any_name() -> None:
    data = [{"t": torch.tensor(2.0), "x": x, "cache": torch.zeros(16, 1)} for x in vectors()]
    small = hq.quantize(Timed().eval(), "9bit", data, weight_bits=8, target="torch", **OPTIONS)
    assert small.hq.bitops == pytest.approx((16 * 32 + 32 * 32 + 32 * 10) * 64)


class Lengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 16), nn.Linear(16, 10)

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        assert lengths is not None
        seen = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
        return self.head((self.words(ids) * seen.unsqueeze(-1)).sum(1))


def test_lengths_are_no_labels() -> None:
    data = [(torch.randint(20, (16, 6)), torch.randint(1, 7, (16,))) for _ in range(8)]
    assert hq.quantize(Lengths().eval(), "9bit", data, weight_bits=8, **OPTIONS).hq.accuracy is None


def test_parts_that_cannot_be_kept_are_named_before_the_work() -> None:
    model = mlp()
    model.add_module("hq", nn.Identity())
    with pytest.raises(ModelError, match="a part of the name 'hq'"):
        hq.quantize(model, "4bit", vectors(), **OPTIONS)
    model = mlp()
    model.register_buffer("twiddle", torch.zeros(3, dtype=torch.complex128))
    with pytest.raises(ModelError, match=r"'twiddle' is torch\.complex128, which no safetensors"):
        hq.quantize(model, "4bit", vectors(), **OPTIONS)
    model = mlp()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ModelError, match="cannot pickle"):
        hq.quantize(model, "4bit", vectors(), **OPTIONS)
    words = nn.Sequential(nn.Embedding(20, 16), nn.Flatten(), nn.Linear(64, 10)).eval()
    with pytest.raises(ConfigError, match="embedding_bits=0 leaves '0' no width"):
        hq.quantize(words, "4bit", [torch.randint(20, (16, 4))] * 8, embedding_bits=0, **OPTIONS)


def test_a_weight_under_two_names_stays_float(tmp_path: Path) -> None:
    model = mlp()
    model[2].alias = model[2].weight
    small = hq.quantize(model, "9bit", vectors(), weight_bits=8, **OPTIONS)
    assert "2" not in packed_modules(small)
    assert small.hq.size == bytes_of(hq.save(small, tmp_path / "small"))


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + torch.randn(10)


def test_a_result_that_is_not_what_was_trained_is_said_to_be() -> None:
    with pytest.warns(HQWarning, match=r"outputs are \d+% off those of the network that was trained"):
        hq.quantize(Random().eval(), "9bit", vectors(), weight_bits=8, **OPTIONS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*off those of the network")
        hq.quantize(cnn(), "2.5bit", pictures(), activation_bits=2, **OPTIONS)


def test_switched_off_quantizers_stay_off() -> None:
    prepared = hq.torch_ao.prepare(mlp(), hq.HybridPolicy({"0": hq.LayerBits(4, 8), "2": hq.LayerBits(4, 8)}))
    prepared[0].weight_fake_quant.disable_fake_quant()
    with hq.torch_ao.calibrate(prepared):
        prepared(vectors()[0])
    assert not bool(prepared[0].weight_fake_quant.fake_quant_enabled[0])
    assert bool(prepared[2].weight_fake_quant.fake_quant_enabled[0])
    hq.torch_ao.convert(prepared.double().float())


@pytest.mark.parametrize("size", [1_239_999, 250_000, 999, 97_345_600])
def test_a_budget_that_is_written_is_the_same_when_read(size: int) -> None:
    assert hq.Budget.parse(str(hq.Budget(size=size))) == hq.Budget(size=size)
    assert hq.Budget.parse(str(hq.Budget(bitops=float(size)))) == hq.Budget(bitops=float(size))


def test_batchnorms_that_wait_for_other_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(cnn())
    assert hq.meta_train(model, pictures(), **OPTIONS).history, "alone they are BatchNorms like any other"
    monkeypatch.setattr("hq_plugin.preparation.processes", lambda: (0, 2))
    with pytest.raises(ModelError, match="SyncBatchNorm"):
        hq.meta_train(model, pictures(), **OPTIONS)


class _Graph(nn.Module):
    """Layers on the nodes of a graph, each with the sum of its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 10)
        self.read = nn.Linear(10, 10)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.last(x.index_add(0, edges[1], x[edges[0]]))
        return F.linear(x, self.read.weight)


@pytest.mark.parametrize("options", [{}, {"sensitivities": "fisher"}])
def test_a_batch_that_no_part_can_be_taken_of(options: dict[str, Any]) -> None:
    """The work was lost at its end, where a part of a batch was compared, or before it with BatchNorm."""
    graphs = [(torch.randn(40, 16), torch.randint(40, (2, 60))) for _ in range(8)]
    model = _Graph().eval()
    small = hq.quantize(model, "9bit", graphs, weight_bits=8, **OPTIONS, **options)
    with torch.no_grad():
        wanted, found = model(*graphs[0]), small(*graphs[0])
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_a_part_that_is_torchscript_stays_float(tmp_path: Path) -> None:
    def made() -> nn.Module:
        scripted = torch.jit.script(nn.Sequential(nn.Linear(32, 32), nn.ReLU()))
        return nn.Sequential(nn.Linear(16, 32), scripted, nn.Linear(32, 10)).eval()

    model = made()
    small = hq.quantize(model, "9bit", vectors(), weight_bits=8, **OPTIONS)
    assert set(packed_modules(small)) == {"0", "2"}
    x = torch.randn(4, 16)
    assert off(small, model, x) < 0.05
    assert torch.equal(hq.load(hq.save(small, tmp_path / "small"), made())(x), small(x))


def test_threads_share_a_session_and_the_seeds() -> None:
    """They gave results that hung on each other, failed, or left the session with another network."""
    session = hq.meta_train(cnn(), pictures(), **OPTIONS)
    budgets, x = ["3bit", "5bit", "3bit", "4bit"], torch.randn(4, 3, 8, 8)
    wanted = [session.quantize(budget)(x) for budget in budgets]
    torch.manual_seed(1)
    with ThreadPoolExecutor(4) as threads:
        found = [small(x) for small in threads.map(session.quantize, budgets)]
    after = torch.rand(1)
    for one, other in zip([*found, session.quantize("3bit")(x)], [*wanted, wanted[0]], strict=True):
        assert torch.equal(one, other)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))


class _Watched(nn.Module):
    """Keeps handles of hooks of its layers, as transformers' models with gradient checkpointing do."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(5000, 16), nn.Linear(16, 10)
        self.handles = [self.words.register_forward_hook(lambda module, args, output: output + 1)]
        self.handle = self.last.register_forward_pre_hook(lambda module, args: (args[0] * 2,))

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.words(ids).mean(1))


@pytest.mark.parametrize("parts", [1, 4])
def test_handles_of_hooks_stay_with_their_layers(parts: int, tmp_path: Path) -> None:
    """The work was lost after the search, where the network was copied; tables of an embedding lost its hooks."""
    model, ids = _Watched().eval(), [torch.randint(5000, (16, 6)) for _ in range(8)]
    small = hq.quantize(model, "10bit", ids, weight_bits=8, embedding_parts=parts, **OPTIONS)
    assert off(small, model, ids[0]) < 0.05
    again = copy.deepcopy(hq.load(hq.save(small, tmp_path / "small"), _Watched()))
    assert torch.equal(again(ids[0]), small(ids[0]))
    for each in (model, small, again):
        each.handle.remove()
        each.handles[0].remove()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in (*small.modules(), *again.modules()))
    assert torch.equal(again(ids[0]), small(ids[0]))
