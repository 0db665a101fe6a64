import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

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


def test_forwards_of_one_network_wait_once_each_and_share_what_was_changed() -> None:
    model, count = chain(), 0

    def meet(name: str, inputs: dict[int, torch.Tensor]) -> None:
        nonlocal count
        count += 1
        assert list(inputs) == [0, 1, 2]

    forwards = {n: (model, partial(model, torch.randn(2, 4))) for n in range(3)}
    in_lockstep(forwards, ["0"], meet)
    assert count == 1


class Ways(nn.Module):
    """Takes the one way or the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.left(x) if x.sum() > 0 else self.right(x))


def test_forwards_that_take_different_ways_meet_where_they_meet() -> None:
    model = Ways().eval()
    met: list[tuple[str, list[str]]] = []
    forwards = {
        "up": (model, partial(model, torch.ones(1, 4))),
        "down": (model, partial(model, -torch.ones(1, 4))),
        "too": (model, partial(model, torch.ones(1, 4))),
    }
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
    in_lockstep(runs({"a": model, "b": model}, torch.randn(3, 4)), ["0", "2"], lambda name, inputs: None)
    assert not ran
