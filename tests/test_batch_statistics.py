"""Whether BatchNorm trains with the statistics of batches: by how far the network is, and for good once decided."""

import contextlib
import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hq_plugin import Config
from hq_plugin.batch_statistics import batch_statistics_pay, follow_batches
from hq_plugin.checkpoint import Checkpoint
from hq_plugin.data import prepare_data
from hq_plugin.distillation import loss_function
from hq_plugin.rates import Rates
from hq_plugin.training import Task, train

KL = loss_function("kl", torch.randn(2, 10))


def moved(model: nn.Module, by: float) -> nn.Module:
    """Returns a copy whose weights are off by a share of their size."""
    torch.manual_seed(0)
    student = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(by * parameter.std(correction=0) * torch.randn_like(parameter))
    return student


def pays(student: nn.Module, teacher: nn.Module, batches) -> bool:  # type: ignore[no-untyped-def]
    data = prepare_data(batches, teacher, Config(effort="smoke"))
    return batch_statistics_pay(student, teacher, data, KL, Accelerator())


def test_they_pay_where_the_network_is_further_away_than_their_noise(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    assert not pays(moved(trained, 0.01), trained, batches)
    assert pays(moved(trained, 1.0), trained, batches)
    assert not trained.training
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_smaller_batches_are_noisier(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    student = moved(trained, 0.1)
    small = [(part, labels) for x, y in batches for part, labels in zip(x.split(2), y.split(2), strict=True)]
    assert pays(student, trained, batches)
    assert not pays(student, trained, small)


def test_without_batchnorm_or_with_single_samples_there_is_nothing_to_use(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    assert not pays(moved(plain, 1.0), plain, batches)
    single = [(x[:1], y[:1]) for x, y in batches]
    assert not pays(moved(trained, 1.0), trained, single)


@pytest.mark.parametrize("at", [3, 11])
@pytest.mark.parametrize("rate", [1e-4, None])
@pytest.mark.parametrize(("by", "expected"), [(0.01, False), (1.0, True)])
def test_it_is_decided_once_and_survives_an_interruption(  # type: ignore[no-untyped-def]
    trained: nn.Module, batches, tmp_path: Path, by: float, expected: bool, rate: float | None, at: int
) -> None:
    def stop(now: bool) -> None:
        if now:
            raise ZeroDivisionError

    states = []
    for stops in ((20,), (at, 20)):
        for at in stops:
            student = moved(trained, by)
            data = prepare_data(batches, trained, Config(effort="smoke"))
            keep = Checkpoint(tmp_path / str(len(stops)), {}, 0)
            job = Task(
                "test", student, trained, data, KL, 20, Rates(rate, rate), batch_statistics=None, checkpoint=keep
            )
            job.before_step = lambda network, step, at=at: stop(step == at)
            with contextlib.suppress(ZeroDivisionError):
                train(job)
        assert [record["batch_statistics"] for record in job.history] == [False] * 2 + [expected] * 18
        states.append(job.network.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    kept = torch.equal(states[0]["bn1.running_mean"], trained.state_dict()["bn1.running_mean"])
    assert kept is not expected


def test_a_close_network_that_rates_throw_back_keeps_its_own_statistics(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    data = prepare_data(batches, trained, Config(effort="smoke"))
    job = Task("test", moved(trained, 0.01), trained, data, KL, 20, Rates(0.3, 0.3), batch_statistics=None)
    seen: list[bool] = []

    def look(network: nn.Module, step: int) -> None:
        if step == 2:
            seen.append(batch_statistics_pay(network, trained, data, KL, Accelerator()))

    job.before_step = look
    train(job)
    assert seen == [True]
    assert not any(record["batch_statistics"] for record in job.history)


@pytest.mark.parametrize(("by", "rate", "expected"), [(0.01, None, 1.0), (1.0, None, 2.0), (1.0, 1e-4, 1.0)])
def test_rates_of_weights_that_nobody_gave_rise_with_them(  # type: ignore[no-untyped-def]
    trained: nn.Module, batches, by: float, rate: float | None, expected: float
) -> None:
    data = prepare_data(batches, trained, Config(effort="smoke"))
    job = Task("test", moved(trained, by), trained, data, KL, 20, Rates(rate, None), batch_statistics=None)
    seen: list[tuple[list[float], list[float]]] = []

    def see(optimizer: torch.optim.Optimizer, *_: object) -> None:
        shares: tuple[list[float], list[float]] = [], []
        for group in optimizer.param_groups:
            vectors = any(p.dim() < 2 for p in group["params"])
            shares[vectors].append(group["lr"] / group["initial_lr"])
        seen.append(shares)

    hook = register_optimizer_step_pre_hook(see)
    try:
        train(job)
    finally:
        hook.remove()
    assert len(seen) == 20
    for step, (weights, vectors) in enumerate(seen):
        assert vectors == pytest.approx([vectors[0]] * len(vectors))
        assert weights == pytest.approx([vectors[0] * (expected if step > 2 else 1)] * len(weights))
    assert bool(weights) is (rate is None)


@pytest.mark.parametrize(("own", "expected"), [(0.01, 0.1), (None, 0.1), (0.3, 0.3)])
def test_statistics_follow_within_some_ten_steps(tiny: nn.Module, own: float | None, expected: float) -> None:
    tiny.bn1.momentum = own  # type: ignore[assignment, union-attr]
    follow_batches(tiny)
    assert tiny.bn1.momentum == expected  # type: ignore[union-attr]
    assert [name for name, module in tiny.named_modules() if module.training] == ["bn1", "bn2"]


def test_blocks_are_compared_in_the_step_of_the_decision_as_well(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    data = prepare_data(batches, trained, Config(effort="smoke"))
    blocks = {"blocks": ["stem", "pointwise"], "block_loss": 1.0}

    def nothing(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return 0 * (student - teacher).sum()

    job = Task(
        "test", moved(trained, 0.5), trained, data, nothing, 10, Rates(1e-6, 1e-6), batch_statistics=None, **blocks
    )  # type: ignore[arg-type]
    train(job)
    first, *others = (record["loss"] for record in job.history)
    assert first > 0
    assert others == pytest.approx([first] * 9, rel=0.5)


def test_a_last_batch_of_one_sample_is_left_out(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    data = prepare_data(batches, trained, Config(effort="smoke"))
    for by, expected in ((0.01, False), (1.0, True)):
        for last in ([], [data.holdout[0].part(0, 1)]):
            longer = dataclasses.replace(data, holdout=[*data.holdout, *last])
            assert batch_statistics_pay(moved(trained, by), trained, longer, KL, Accelerator()) is expected
