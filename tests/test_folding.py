import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hq_plugin import LayerBits, kernels
from hq_plugin.kernels import Choice, choose_kernels, kernel_of, use_kernel
from hq_plugin.nn import PackedModule, cache_weights
from hq_plugin.nn.kernels import KERNELS, REFERENCE
from tests.nn.test_kernels import packed

NOWHERE = Path("/dev/null/none")
X = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(5))


def norm(channels: int, kind: Callable[[int], Any] = nn.BatchNorm2d) -> Any:
    """A BatchNorm with statistics, and with scales of both signs."""
    made = kind(channels)
    with torch.no_grad():
        for tensor in (made.running_mean, made.weight, made.bias):
            tensor.copy_(torch.randn(channels))
        made.running_var.copy_(torch.rand(channels) + 0.1)
    return made.eval()


def conv(
    inputs: int, outputs: int, kind: Any = nn.Conv2d, bits: tuple[int, int] = (4, 8), **kwargs: Any
) -> PackedModule:
    return packed(kind(inputs, outputs, 3, **kwargs), LayerBits(*bits))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[REFERENCE, "int8"])
def choose(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, bool]]:
    """Chooses one kernel for every layer, and returns which are folded."""
    name = request.param
    if name != REFERENCE and KERNELS[name].refuses(conv(4, 4)) is not None:
        pytest.skip("this machine does not have it")

    def measured(layer: PackedModule, x: Tensor, others: Any) -> Choice:
        return Choice(name, {name: 1.0}, {})

    def run(model: nn.Module, x: Tensor = X) -> dict[str, bool]:
        monkeypatch.setattr(kernels, "measure", measured)
        found = choose_kernels(model, x, cache=NOWHERE)
        assert {kernel_of(model.get_submodule(layer)) for layer in found} == {name}  # type: ignore[arg-type]
        return {layer: choice.folded for layer, choice in found.items()}

    return run


class Normalisations(TorchFunctionMode):
    """Counts calls of batch_norm."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__ == "batch_norm"
        return func(*args, **(kwargs or {}))


def normalisations(model: nn.Module, x: Tensor = X) -> int:
    with torch.no_grad(), Normalisations() as mode:
        model(x)
    return mode.count


def chain() -> nn.Sequential:
    return nn.Sequential(
        conv(4, 8, stride=2, padding=1), norm(8), nn.ReLU(inplace=True), conv(8, 8, groups=8, bias=False), norm(8)
    ).eval()


@torch.no_grad()
def test_convolutions_take_over_the_batchnorm_after_them(choose: Callable[..., dict[str, bool]]) -> None:
    model = chain()
    expected = model(X)
    assert normalisations(model) == 2
    assert choose(model) == {"0": True, "3": True}
    assert normalisations(model) == 0
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
    more = torch.randn(5, 4, 12, 7)
    torch.testing.assert_close(model(more), copy.deepcopy(model)(more), rtol=1e-4, atol=1e-4)
    assert all(isinstance(model[i], nn.BatchNorm2d) for i in (1, 4))
    assert set(model.state_dict()) == set(chain().state_dict())


@torch.no_grad()
def test_it_is_undone(choose: Callable[..., dict[str, bool]]) -> None:
    model = chain()
    expected = model(X)
    choose(model)
    use_kernel(model, REFERENCE)
    assert type(model[1]) is nn.BatchNorm2d
    assert torch.equal(model(X), expected)
    choose(model)
    copied = copy.deepcopy(model)
    assert type(copied[1]) is nn.BatchNorm2d
    assert torch.equal(copied(X), expected)


def changed_batchnorm(model: Any) -> None:
    model[1].load_state_dict(norm(8).state_dict())


def changed_statistics(model: Any) -> None:
    model[4].running_var.mul_(2)


def another_scale(model: Any) -> None:
    model[4].weight = nn.Parameter(torch.ones(8))


def changed_weights(model: Any) -> None:
    model[0].load_state_dict(conv(4, 8).state_dict())


def training(model: Any) -> None:
    model.train()


def trained(model: Any) -> None:
    model.train()
    model(X + 1)
    model.eval()


def part_training(model: Any) -> None:
    model[1].train()


def double(model: Any) -> None:
    model.double()


def without_cache(model: Any) -> None:
    cache_weights(model, False)


@pytest.mark.parametrize(
    "change",
    [
        changed_batchnorm,
        changed_statistics,
        another_scale,
        changed_weights,
        training,
        trained,
        part_training,
        double,
        without_cache,
    ],
)
@torch.no_grad()
def test_what_changes_is_seen(change: Callable[[Any], None], choose: Callable[..., dict[str, bool]]) -> None:
    model = chain()
    choose(model)
    reference = copy.deepcopy(model)
    for made in (model, reference):
        torch.manual_seed(3)
        change(made)
    x = X.to(model[1].weight.dtype)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[1].running_mean, reference[1].running_mean, rtol=1e-4, atol=1e-4)


def test_weights_that_are_not_kept_are_not_kept_for_this(choose: Callable[..., dict[str, bool]]) -> None:
    model = cache_weights(chain(), False)
    kept = choose(model)["0"]
    assert kept == (kernel_of(model[0]) != REFERENCE)  # type: ignore[index]
    choose(cache_weights(model, True))
    assert normalisations(model) == 0
    cache_weights(model, False)
    assert normalisations(model) == (0 if kept else 2)


class Uses(nn.Module):
    """A convolution and a BatchNorm, and a forward that is given."""

    def __init__(self, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.other, self.norm, self.run = conv(4, 4, padding=1), conv(4, 4, padding=1), norm(4), run
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.norm(y := m.conv(x)) + y,
        lambda m, x: (m.norm(y := m.conv(x)), {"raw": y}),
        lambda m, x: m.norm(F.relu(m.conv(x))),
        lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x)),
        lambda m, x: m.norm(m.conv(m.conv(x))),
        lambda m, x: m.norm(m.conv(x)) + m.conv(-x),
        lambda m, x: m.norm(y := m.conv(x)) + m.other(y),
        lambda m, x: m.norm(y := m.conv(x)) + m.other(input=y),
        lambda m, x: m.norm(input=m.conv(x)),
        lambda m, x: m.norm(m.norm(m.conv(x))),
        lambda m, x: m.norm(m.conv(x)[:, :, ::2]),
        lambda m, x: m.norm(x) + m.conv(x),
    ],
)
@torch.no_grad()
def test_only_results_that_go_nowhere_else(
    run: Callable[[Any, Tensor], Any], choose: Callable[..., dict[str, bool]]
) -> None:
    model = Uses(run)
    expected = model(X)
    assert not any(choose(model).values())
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)


def test_hooked_convolutions_are_left_alone(choose: Callable[..., dict[str, bool]]) -> None:
    model = chain()
    model[0].register_forward_hook(lambda *_: None)
    assert choose(model) == {"0": False, "3": True}


def test_batchnorms_that_learn_or_have_no_numbers_are_left_alone(choose: Callable[..., dict[str, bool]]) -> None:
    plain = nn.BatchNorm2d(8, affine=False)
    model = nn.Sequential(conv(4, 8), norm(8).train(), conv(8, 8), plain.eval(), conv(8, 8), nn.LayerNorm(3))
    assert not any(choose(model).values())


class WithActivation(nn.BatchNorm2d):
    """As timm's: runs what it holds afterwards, in place."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        return self.act(self.drop(super().forward(x)))  # type: ignore[no-any-return]


class Doubling(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(("kind", "folds"), [(WithActivation, True), (Doubling, False)])
@torch.no_grad()
def test_batchnorms_that_do_more(kind: Any, folds: bool, choose: Callable[..., dict[str, bool]]) -> None:
    model = nn.Sequential(conv(4, 8), norm(8, kind), conv(8, 4), norm(4, kind)).eval()
    expected = model(X)
    assert set(choose(model).values()) == {folds}
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
    assert normalisations(model) == (0 if folds else 2)


class PaddedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, 1, self.groups)


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return F.conv2d(x, weight, self.bias)


@pytest.mark.parametrize(("kind", "folds"), [(PaddedConv, True), (StandardisedConv, False)])
@pytest.mark.parametrize("activation", [8, 16])
@torch.no_grad()
def test_convolutions_with_a_forward_of_their_own(kind: Any, folds: bool, activation: int) -> None:
    model = nn.Sequential(conv(4, 8, kind, (4, activation), stride=1), norm(8)).eval()
    expected = model(X)
    assert choose_kernels(model, X, cache=NOWHERE)["0"].folded == folds
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compilers_see_the_layers_as_they_were(choose: Callable[..., dict[str, bool]]) -> None:
    model = chain()
    expected = model(X)
    choose(model)
    exported = torch.export.export(model, (X,)).module()
    torch.testing.assert_close(exported(X), expected, rtol=1e-4, atol=1e-4)
    names = [node.target for node in torch.export.export(model, (X,)).graph.nodes]
    assert sum("batch_norm" in str(name) for name in names) == 2
    names = [str(node.target) for node in torch.fx.symbolic_trace(model).graph.nodes if node.op == "call_module"]
    assert {"1", "4"} <= set(names)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), expected, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_layers_as_they_were(choose: Callable[..., dict[str, bool]]) -> None:
    model = chain()
    choose(model)
    gradients = []
    for made in (model, copy.deepcopy(model)):
        x = X.clone().requires_grad_()
        made(x).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_one_dimensional_convolutions() -> None:
    model = nn.Sequential(conv(4, 8, nn.Conv1d), norm(8, nn.BatchNorm1d)).eval()
    x = torch.randn(3, 4, 20)
    expected = model(x)
    assert choose_kernels(model, x, cache=NOWHERE)["0"].folded
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_folded_models_are_pickled(choose: Callable[..., dict[str, bool]]) -> None:
    model = chain()
    choose(model)
    # Bytes of our own, as a process that is spawned gets them.
    again = pickle.loads(pickle.dumps(model))
    assert type(again[1]) is nn.BatchNorm2d
    torch.testing.assert_close(again(X), model(X), atol=1e-4, rtol=1e-4)
