import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hq_plugin import Config, HQWarning, TrainingError
from hq_plugin.batch import make_batch
from hq_plugin.checkpoint import Checkpoint
from hq_plugin.data import prepare_data
from hq_plugin.distillation import LossFunction, loss_function
from hq_plugin.modes import set_training_modes, without_recurrent_dropout
from hq_plugin.rates import Rates
from hq_plugin.seeding import seeded
from hq_plugin.training import TELLING, Task, train
from tests.conftest import TinyNet


def task(model: nn.Module, batches, steps: int = 25, **options) -> Task:  # type: ignore[no-untyped-def]
    data = prepare_data(batches, model, Config(effort="smoke"))
    student = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    loss = options.pop("loss", loss_function("kl", torch.randn(2, 10)))
    return Task("test", student, model, data, loss, steps, Rates(3e-3, 3e-3), **options)


def test_the_student_comes_closer(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    job = task(trained, batches)
    train(job)
    losses = [record["loss"] for record in job.history]
    assert len(losses) == 25
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert not job.network.training


def test_the_same_seed_gives_the_same_network(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        job = task(trained, batches, steps=4)
        with seeded(3):
            train(job)
        results.append(job.network.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def breaking_after(steps: int) -> LossFunction:
    """Returns a loss that is not a number any more after some steps."""
    kl, calls = loss_function("kl", torch.randn(2, 10)), count()
    return lambda student, teacher: kl(student, teacher) * (1.0 if next(calls) < steps else math.nan)


def test_a_loss_that_becomes_nan_goes_back_to_the_last_good_state(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    job = task(trained, batches, steps=40, loss=breaking_after(30))
    with pytest.warns(HQWarning, match=r"became nan at step 30 of 40.*state of step 28"):
        train(job)
    assert len(job.history) == 30
    assert all(torch.isfinite(value).all() for value in job.network.state_dict().values())


def test_gradients_of_a_step_that_was_not_taken_are_let_go(  # type: ignore[no-untyped-def]
    trained: nn.Module, batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    job = task(trained, batches, steps=10, loss=breaking_after(5))  # in the second part of a step
    with pytest.warns(HQWarning, match=r"became nan at step 2 of 10"):
        train(job)
    assert all(p.grad is None for p in job.network.parameters())


def test_an_early_nan_costs_no_more_than_training(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    job = task(trained, batches, steps=2000, loss=breaking_after(3))
    before = {name: value.clone() for name, value in job.network.state_dict().items()}
    with pytest.warns(HQWarning, match=r"became nan at step 3 of 2000.*state of step 0"):
        train(job)
    assert all(torch.equal(before[name], p) for name, p in job.network.named_parameters())


def test_a_state_counts_as_good_once_its_loss_is_known(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    def break_it(network: nn.Module, step: int) -> None:
        if step == 12:  # where a state is kept
            with torch.no_grad():
                next(network.parameters()).fill_(math.nan)

    job = task(trained, batches, steps=40)
    job.before_step = break_it
    with pytest.warns(HQWarning, match=r"became nan at step 12 of 40.*state of step 10"):
        train(job)
    assert all(torch.isfinite(value).all() for value in job.network.state_dict().values())


def test_an_output_without_a_gradient_says_why(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    kl = loss_function("kl", torch.randn(2, 10))
    job = task(trained, batches, steps=3, loss=lambda student, teacher: kl(student.detach(), teacher))
    with pytest.raises(TrainingError, match=r"no gradient: its forward runs under torch\.no_grad"):
        train(job)


def test_a_loss_that_starts_as_nan_raises(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    job = task(trained, batches, loss=lambda s, t: (s - t).sum() * math.inf)
    with pytest.raises(TrainingError, match="at step 0"):
        train(job)


def test_no_steps_change_nothing() -> None:
    model = TinyNet()
    job = Task("test", model, model, None, None, 0, Rates(1e-3, 1e-3))  # type: ignore[arg-type]
    before = copy.deepcopy(model.state_dict())
    train(job)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("rate", [None, 1e-3])
def test_steps_of_few_samples_move_less_where_nobody_gave_a_rate(tiny: nn.Module, rate: float | None) -> None:
    moved = []
    for samples in (8, 32):
        data = [(torch.randn(samples, 1, 8, 8), None) for _ in range(6)]
        torch.manual_seed(0)  # for the same weights, by whose size they move
        job = task(tiny, data, steps=1)
        job.rates = Rates(rate, 3e-3)
        before = job.network.head.weight.detach().clone()
        train(job)
        # The first step of Adam is as long as its rate, whatever the gradient.
        moved.append(float((job.network.head.weight.detach() - before).abs().max()))  # type: ignore[union-attr]
    assert moved[1] == pytest.approx(moved[0] * (2 if rate is None else 1), rel=0.01)


class Noisy(nn.Module):
    """A network with everything that differs between training and evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.dropout = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.head = nn.Linear(4 * 36, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.bn(self.conv(x)).flatten(1)))


@pytest.mark.parametrize("batch_statistics", [True, False])
def test_only_batchnorm_may_train_in_its_training_mode(batches, batch_statistics: bool) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    job = task(Noisy().eval(), batches, steps=2, batch_statistics=batch_statistics)
    modes = []
    job.before_step = lambda network, step: modes.append({name: m.training for name, m in network.named_children()})
    before = job.network.bn.running_mean.clone()
    train(job)
    expected = {"conv": False, "bn": batch_statistics, "dropout": False, "head": False}
    assert modes == [expected, expected]
    assert torch.equal(before, job.network.bn.running_mean) is not batch_statistics


def test_mixed_precision_is_accelerate_s(trained: nn.Module, batches, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    try:
        torch.manual_seed(0)
        job = task(trained, batches, steps=6)
        dtypes = set()
        job.network.head.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
        own = job.network.forward
        train(job)
        assert dtypes == {torch.bfloat16}
        # What was trained runs by itself as before.
        assert job.network.forward == own
        assert job.network(batches[0][0]).dtype == torch.float32
        assert all(math.isfinite(record["loss"]) for record in job.history)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_batches_of_a_step_are_accumulated_as_accelerate_is_configured(
    trained: nn.Module, batches, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # no BatchNorm, which knows one batch at a time
    whole = [x for x, _ in batches[:8]]
    halves = [half for x in whole for half in x.split(32)]
    losses = {}
    for steps, data in ((1, whole), (2, halves)):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(steps))
        torch.manual_seed(0)
        job = task(model, data, steps=5)
        job.data = dataclasses.replace(job.data, train=[make_batch(x, lambda x: ((x,), {}, None)) for x in data])
        train(job)
        losses[steps] = [record["loss"] for record in job.history]
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    assert Accelerator().gradient_accumulation_steps == 1


def test_accumulated_batches_are_passed_over_when_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    data = list(torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(0)).split(8))
    states = []
    for stops in ((6,), (2, 6)):
        for stop in stops:
            torch.manual_seed(0)
            job = task(model, data, steps=6, checkpoint=Checkpoint(tmp_path / str(len(stops)), {}, 0))
            job.before_step = lambda network, step, stop=stop: _stop(step == stop)
            with contextlib.suppress(ZeroDivisionError):
                train(job)
        states.append(job.network.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    Accelerator()


def _stop(now: bool) -> None:
    if now:
        raise ZeroDivisionError


class Keeps(nn.Module):
    """Keeps what it computed from a parameter from one forward to the next, as LeViT does in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bias, self.kept = nn.Linear(4, 3), nn.Parameter(torch.zeros(3)), {}  # type: ignore[var-annotated]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        computed = self.bias.sin()
        return self.linear(x) + (self.kept.setdefault("bias", computed) if torch.is_grad_enabled() else computed)


class Forgets(nn.Module):
    """Keeps in eval mode what it computed from a parameter, and forgets it in training mode, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bias, self.kept = nn.Linear(4, 3), nn.Parameter(torch.zeros(3)), {}  # type: ignore[var-annotated]
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.linear(x)) + self.kept.setdefault("bias", self.bias.sin())

    def train(self, mode: bool = True) -> "Forgets":
        if mode:
            self.kept.clear()
        return super().train(mode)


def test_what_eval_mode_keeps_is_forgotten_when_its_parameters_change() -> None:
    data = [torch.randn(8, 4) for _ in range(12)]
    model = Forgets().eval()
    with torch.no_grad():
        model(data[0])  # keeps the bias of now
    job = task(model, data, steps=8, loss=loss_function("mse", torch.randn(2, 3)))
    with torch.no_grad():
        job.teacher.bias.fill_(0.3)
        job.teacher.kept.clear()
    before = job.network.get_parameter("bias").detach().clone()
    train(job)
    assert not torch.equal(job.network.get_parameter("bias"), before)
    assert not any(module.training for module in job.network.modules())
    with torch.no_grad():
        kept = job.network(data[0]) - job.network.linear(data[0])
    assert torch.allclose(kept, job.network.bias.sin().expand_as(kept), atol=1e-6)
    copy.deepcopy(job.network)


def test_a_graph_that_is_kept_between_forwards_says_what_to_do() -> None:
    data = [torch.randn(8, 4) for _ in range(6)]
    job = task(Keeps().eval(), data, steps=3, loss=loss_function("mse", torch.randn(2, 3)))
    with pytest.raises(TrainingError, match="train_float=False"):
        train(job)
    job = task(Keeps().eval(), data, steps=3, loss=loss_function("mse", torch.randn(2, 3)))
    job.network.get_parameter("bias").requires_grad_(False)  # what train_float=False does
    train(job)
    assert len(job.history) == 3


def test_recurrent_layers_drop_nothing_while_they_train() -> None:
    torch.manual_seed(0)
    network = nn.LSTM(4, 8, 2, dropout=0.5)
    set_training_modes(network, batch_statistics=True)
    assert not network.training  # cuDNN alone needs that
    network.train()
    x = torch.randn(3, 5, 4)
    with without_recurrent_dropout(network):
        assert torch.equal(network(x)[0], network(x)[0])
    assert network.dropout == 0.5


def near(model: nn.Module, batches, keep: Checkpoint | None = None) -> Task:  # type: ignore[no-untyped-def]
    """A task whose student is close to its teacher, in which high rates lead away."""
    torch.manual_seed(0)
    job = task(model, batches, steps=10 * TELLING, batch_statistics=None, backs_off=True, checkpoint=keep)
    with torch.no_grad():
        for mine, theirs in zip(job.network.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs + 1e-2 * torch.randn_like(theirs))
    return job


@pytest.mark.parametrize(("rate", "ends"), [(0.5, False), (1e-4, True)])
def test_training_that_leads_away_backs_off_and_stays_so_when_it_is_started_again(
    trained: nn.Module,
    batches,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    rate: float,
    ends: bool,
) -> None:
    def stop_at(step: int) -> Callable[[nn.Module, int], None]:
        def stop(network: nn.Module, now: int) -> None:
            if now == step:
                raise ZeroDivisionError

        return stop

    whole = near(trained, batches)
    whole.rates = Rates(rate, rate)
    assert train(whole) is ends
    for step in (3, -1, 0):  # killed before it was seen, gone on with, and asked for once it is done
        job = near(trained, batches, Checkpoint(tmp_path / "kept", {}, 0))
        job.rates, job.before_step = Rates(rate, rate), stop_at(step)
        with pytest.raises(ZeroDivisionError) if step == 3 else contextlib.nullcontext():
            assert train(job) is ends
    assert job.history == whole.history
    assert len(job.history) == (job.steps if ends else TELLING)
    assert job.history[-1].get("led_away", False) is not ends


def test_few_steps_do_not_tell(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    job = near(trained, batches)
    job.steps, job.rates = 10 * (TELLING - 1), Rates(0.5, 0.5)
    assert train(job)
