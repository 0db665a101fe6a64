import copy
import threading

import pytest
import torch
from torch import nn

from hq_plugin import HybridPolicy, LayerBits, torch_ao
from hq_plugin.batch import Batch
from hq_plugin.outer_products import input_products
from hq_plugin.qat_layers import qat_layers
from hq_plugin.recalibration import measured_statistics
from hq_plugin.sequential_rounding import _calls, _lacking, _round_shared, start_from_good_integers


def pictures(count: int = 256) -> torch.Tensor:
    torch.manual_seed(0)
    return nn.Conv2d(3, 8, 3, bias=False)(torch.randn(count, 3, 10, 10)).detach()


def batches(x: torch.Tensor, count: int = 4) -> list[Batch]:
    return [Batch((part,), {}, None, len(part)) for part in x.chunk(count)]


def deep(normalised: bool) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Conv2d(8, 8, 3, padding=1, bias=not normalised)]
        layers += [nn.BatchNorm2d(8, momentum=None)] if normalised else []  # type: ignore[arg-type]
        layers += [nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, 5))
    if normalised:
        model.train()(pictures())
    return model.eval()


def prepared(model: nn.Module, bits: int = 2) -> nn.Module:
    names = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    network = torch_ao.prepare(model, HybridPolicy({name: LayerBits(bits, 8) for name in names})).eval()
    with torch_ao.calibrate(network), torch.no_grad():
        network(pictures())
    return network


@torch.no_grad()
def distance(network: nn.Module, model: nn.Module, x: torch.Tensor) -> float:
    return float((network(x) - model(x)).square().mean())


def test_layers_make_up_for_those_before_them() -> None:
    model, x = deep(normalised=False), pictures()
    alone, in_order = prepared(model), prepared(model)
    layers = qat_layers(alone)
    with torch_ao.float_forward(alone):
        products = input_products(alone, layers, batches(x))
    _round_shared(layers, products)
    start_from_good_integers(in_order, model, batches(x))
    torch.manual_seed(2)
    other = pictures(64) + 0.1 * torch.randn(64, 8, 8, 8)
    assert distance(in_order, model, other) < 0.8 * distance(alone, model, other)


def test_batchnorm_follows_what_reaches_it() -> None:
    model, x = deep(normalised=True), pictures()
    network, stale = prepared(model), prepared(model)
    start_from_good_integers(network, model, batches(x))
    exact = measured_statistics(copy.deepcopy(network), batches(x))
    far, near = 0.0, 0.0
    for name, seen in exact.items():
        known, found = stale.get_submodule(name), network.get_submodule(name)
        far += float((known.running_var / seen.variance).log().abs().mean())  # type: ignore[operator]
        near += float((found.running_var / seen.variance).log().abs().mean())  # type: ignore[operator]
    assert near < 0.2 * far


def test_it_comes_out_the_same_every_time_and_leaves_no_thread() -> None:
    model, x, before = deep(normalised=True), pictures(), threading.active_count()
    one, other = prepared(model), prepared(model)
    for network in (one, other):
        start_from_good_integers(network, model, batches(x))
    same = other.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in one.state_dict().items())
    assert threading.active_count() == before


class Experts(nn.Module):
    """Sends a sample to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        chosen = (x[:, 0] > 0).long()
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            if bool((chosen == number).any()):
                out[chosen == number] = expert(h[chosen == number])
        return self.head(out)


class Recurring(nn.Module):
    """Runs one layer several times."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = x + 0.3 * torch.tanh(self.step(x))
        return self.head(x)


class Noting(nn.Module):
    """Notes in its forward what it needs at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.noted = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.noted = x
        found = torch.tanh(self.second(torch.tanh(self.first(x))))
        assert self.noted is x
        return self.head(found + self.noted)


@pytest.mark.parametrize("kind", [Experts, Recurring, Noting])
def test_a_model_that_goes_other_ways_starts_closer_too(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(256, 6) @ torch.randn(6, 16)
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    policy = HybridPolicy({name: LayerBits(3, 16, 16) for name in names})
    network = torch_ao.prepare(model, policy).eval()
    network(x)
    nearest = distance(network, model, x)
    start_from_good_integers(network, model, batches(x))
    assert distance(network, model, x) < 0.9 * nearest


def test_statistics_that_followed_are_known_to_have() -> None:
    model, x = deep(normalised=True), pictures()
    assert start_from_good_integers(prepared(model), model, batches(x))
    norms = [layer for layer in model if isinstance(layer, nn.BatchNorm2d)]
    again = nn.Sequential(*model, nn.Unflatten(1, (5, 1, 1)), nn.BatchNorm2d(5), nn.Flatten()).eval()
    assert not start_from_good_integers(prepared(again), again, [batches(x, 256)[0]])  # one sample: no variance
    again[3], again[4] = again[0], norms[0]  # runs twice, on different inputs
    assert not start_from_good_integers(prepared(again), again, batches(x))


def test_what_is_of_another_sample_is_not_made_up_for() -> None:
    torch.manual_seed(0)
    own = torch.randn(1, 100, 32)
    near = own + 0.2 * torch.randn_like(own)
    assert torch.equal(_lacking(own, near), near - own)
    flipped = torch.cat([near[:, :40], near[:, 41:], near[:, 40:41]], 1)  # one token went another way
    found = _lacking(own, flipped)
    assert torch.equal(found[:, :40], (near - own)[:, :40])
    assert float(found[:, 40:].square().sum()) < 0.1 * float((flipped - own)[:, 40:].square().sum())
    assert not bool(_lacking(own, near[:, :-1]).any())
    assert not bool(_lacking(own, None).any())


class Keeping(nn.Module):
    """Keeps its attention, for who wants to look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.query, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        self.attention = torch.softmax(self.query(x) @ x.mT, -1)
        return self.head(self.attention @ x)


def test_a_model_that_keeps_what_it_computed() -> None:
    torch.manual_seed(0)
    model, ids = Keeping().eval(), torch.randint(0, 40, (64, 6))
    policy = HybridPolicy({name: LayerBits(3, 16) for name in ("words", "query", "head")})
    network = torch_ao.prepare(model, policy).eval()
    before = network.head._parameters["weight"].clone()  # type: ignore[operator, union-attr, index]
    start_from_good_integers(network, model, batches(ids))
    assert not torch.equal(network.head._parameters["weight"], before)  # type: ignore[union-attr, index, arg-type]


class OfTokens(nn.BatchNorm1d):
    """Normalises the last dimension of tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(OfTokens(16, momentum=None), (65, 7, 16)), (nn.BatchNorm1d(16, momentum=None), (65, 16))],  # type: ignore[arg-type]
)
def test_batchnorms_are_asked_how_they_read_and_a_last_single_sample_says_nothing(
    norm: nn.Module, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), norm, nn.Linear(16, 4))
    norm.reset_running_stats()  # type: ignore[operator]
    x = torch.randn(shape)
    model.train()(x)
    model.eval()
    network = torch_ao.prepare(model, HybridPolicy({"0": LayerBits(2, 16), "2": LayerBits(2, 16)})).eval()
    nearest, weight = distance(network, model, x), network[2]._parameters["weight"].clone()  # type: ignore[index, union-attr, operator]
    start_from_good_integers(network, model, [Batch((part,), {}, None, len(part)) for part in x.split(32)])
    assert not torch.equal(network[2]._parameters["weight"], weight)  # type: ignore[index, union-attr, arg-type]
    assert distance(network, model, x) < nearest


class HeadFirst(nn.Module):
    """Defines what it runs last first, and leaves a layer out for some inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.some, self.stem = nn.Linear(16, 4), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(torch.tanh(self.some(x)) if x[0, 0] > 0 else x)


def test_modules_are_met_in_the_order_in_which_they_run() -> None:
    torch.manual_seed(0)
    model = HeadFirst().eval()
    parts = batches(torch.randn(64, 16), 8)
    assert {bool(torch.tanh(model.stem(part.args[0]))[0, 0] > 0) for part in parts} == {True, False}
    order, several = _calls(model, ["head", "some", "stem"], parts)
    assert order == ["stem", "some", "head"]
    assert not several
    assert _calls(Recurring().eval(), ["head", "step"], parts) == (["step", "head"], {"step"})
