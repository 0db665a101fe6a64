import contextlib
import random
import threading
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hq_plugin.lockstep import in_lockstep


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)).eval()


def runs(models: dict[str, nn.Module], x: torch.Tensor) -> dict[str, Any]:
    return {key: (model, partial(model, x)) for key, model in models.items()}


def test_all_forwards_meet_at_each_module_before_any_goes_on() -> None:
    model, x = chain(), torch.randn(3, 4)
    met: list[tuple[str, list[str]]] = []

    def meet(name: str, inputs: dict[str, torch.Tensor]) -> None:
        met.append((name, list(inputs)))
        for value in inputs.values():
            torch.testing.assert_close(value, x if name == "0" else model[:2](x))

    in_lockstep(runs({"a": model, "b": chain()}, x), ["0", "2"], meet)
    assert met == [("0", ["a", "b"]), ("2", ["a", "b"])]


def test_what_is_changed_at_a_meeting_is_what_the_forward_runs() -> None:
    float_model, changed, x = chain(), chain(), torch.randn(3, 4)
    seen: dict[str, torch.Tensor] = {}

    def meet(name: str, inputs: dict[str, torch.Tensor]) -> None:
        if name == "0":
            with torch.no_grad():
                changed[0].weight.zero_()  # type: ignore[operator]
        else:
            seen.update(inputs)

    in_lockstep(runs({"float": float_model, "changed": changed}, x), ["0", "2"], meet)
    torch.testing.assert_close(seen["float"], float_model[:2](x))
    torch.testing.assert_close(seen["changed"], changed[1](changed[0].bias.expand(3, 4)))
    assert not seen["changed"].requires_grad


class Ways(nn.Module):
    """Takes the one way or the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.left(x) if x.sum() > 0 else self.right(x))


def test_forwards_that_take_different_ways_meet_where_they_meet() -> None:
    met: list[tuple[str, list[str]]] = []
    ways, signs = {name: Ways().eval() for name in ("up", "down", "too")}, {"up": 1, "down": -1, "too": 1}
    forwards = {name: (model, partial(model, signs[name] * torch.ones(1, 4))) for name, model in ways.items()}
    in_lockstep(forwards, ["left", "right", "head"], lambda name, inputs: met.append((name, list(inputs))))
    assert met == [("left", ["up", "too"]), ("right", ["down"]), ("head", ["up", "down", "too"])]


def test_a_module_that_none_reaches_is_not_waited_for() -> None:
    model = Ways().eval()
    met: list[str] = []
    in_lockstep(
        {"up": (model, partial(model, torch.ones(1, 4)))},
        ["left", "right", "head"],
        lambda name, inputs: met.append(name),
    )
    assert met == ["left", "head"]


@pytest.mark.parametrize("at", ["in a forward", "in a meeting", "before any"])
def test_an_error_ends_all_of_them(at: str) -> None:
    model, x = chain(), torch.randn(3, 4)

    def meet(name: str, inputs: dict[str, torch.Tensor]) -> None:
        if at == "in a meeting" and name == "2":
            raise ValueError("here")

    def fail(model: nn.Module) -> None:
        if at == "before any":
            raise ValueError("here")
        model[0](x)  # type: ignore[operator]
        raise ValueError("here")

    forwards = runs({"a": model, "b": chain()}, x)
    if at != "in a meeting":
        forwards["b"] = (forwards["b"][0], partial(fail, forwards["b"][0]))
    before = threading.active_count()
    with pytest.raises(ValueError, match="here"):
        in_lockstep(forwards, ["0", "2"], meet)
    assert threading.active_count() == before
    assert not model[0]._forward_pre_hooks


def test_nothing_runs_past_the_last_meeting() -> None:
    model = chain()
    ran: list[int] = []
    model[3].register_forward_hook(lambda *_: ran.append(1))
    in_lockstep(runs({"a": chain(), "b": model}, torch.randn(3, 4)), ["0", "2"], lambda name, inputs: None)
    assert not ran


class Drawing(nn.Module):
    """Draws at random in eval mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x + random.random() + float(np.random.rand()))
        return self.second(F.dropout(x, training=True))


def test_networks_draw_alike_at_random_and_the_caller_s_randomness_is_its_own() -> None:
    torch.manual_seed(0)
    one, other, x = Drawing(), Drawing(), torch.randn(8, 4)
    other.load_state_dict(one.state_dict())
    seen: dict[str, torch.Tensor] = {}

    def meet(name: str, inputs: dict[str, torch.Tensor]) -> None:
        seen.update(inputs)

    state = torch.get_rng_state(), random.getstate()
    in_lockstep(runs({"a": one, "b": other}, x), ["first", "second"], meet)
    assert torch.equal(seen["a"], seen["b"])
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()


class Around(nn.Module):
    """Changes around a layer what is the process's, and puts back what it found."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
                warnings.simplefilter("ignore")
                return self.layer(x)
        finally:
            torch.set_default_dtype(dtype)


def test_the_process_is_as_it_was() -> None:
    filters = list(warnings.filters)
    names = [str(n) for n in range(3)]
    in_lockstep(runs({name: Around() for name in names}, torch.randn(2, 4)), ["layer"], lambda name, inputs: None)
    assert torch.get_default_dtype() == torch.float32
    assert torch.backends.cuda.flash_sdp_enabled()
    assert list(warnings.filters) == filters


class Catching(nn.Module):
    """Catches whatever there is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with contextlib.suppress(BaseException):
            x = self.first(x)
        return self.second(x)


def test_a_forward_that_catches_everything_ends_all_the_same() -> None:
    before = threading.active_count()

    def meet(name: str, inputs: dict[str, torch.Tensor]) -> None:
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        in_lockstep(runs({"a": Catching(), "b": Catching()}, torch.randn(2, 4)), ["first", "second"], meet)
    assert threading.active_count() == before
