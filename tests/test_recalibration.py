import copy

import pytest
import torch
from torch import nn

from hq_plugin import Config
from hq_plugin.batch import Batch
from hq_plugin.data import prepare_data
from hq_plugin.recalibration import Recalibration, measured_statistics


@pytest.fixture
def some(trained: nn.Module, batches) -> list[Batch]:  # type: ignore[no-untyped-def]
    return list(prepare_data(batches[:4], trained, Config(effort="smoke")).train)


def test_batch_statistics_are_means_over_batches(trained: nn.Module, some: list[Batch]) -> None:
    model = copy.deepcopy(trained)
    seen: list[torch.Tensor] = []
    model.bn1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    statistics = measured_statistics(model, some)
    torch.testing.assert_close(statistics["bn1"].mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    variance = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(statistics["bn1"].variance, variance)
    assert model.bn1.momentum == 0.1
    assert not model.bn1.training


def test_the_teacher_s_own_statistics_come_back(trained: nn.Module, some: list[Batch]) -> None:
    model, before = copy.deepcopy(trained), copy.deepcopy(trained.state_dict())
    Recalibration(trained, [some[0].take(8)])(model)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name])
        if "running" in name:
            torch.testing.assert_close(model.state_dict()[name], value)


def test_a_scaled_layer_scales_its_statistics_whatever_the_sample(trained: nn.Module, some: list[Batch]) -> None:
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model.stem.weight.mul_(3)
    Recalibration(trained, [some[0].take(4)])(model)
    # The variance is known exactly; the mean has the sample's error in what it grew by.
    torch.testing.assert_close(model.bn1.running_var, 9 * trained.bn1.running_var, rtol=1e-4, atol=0)


def test_few_samples_come_closer_to_all_than_plain_statistics_do(trained: nn.Module, some: list[Batch]) -> None:
    teacher = copy.deepcopy(trained)
    measured_statistics(teacher, some)  # leaves the statistics of all samples behind
    plain = ours = 0.0
    for seed in range(5):
        torch.manual_seed(seed)
        model = copy.deepcopy(teacher)
        with torch.no_grad():
            for parameter in (model.stem.weight, model.depthwise.weight):
                parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
        exact = measured_statistics(copy.deepcopy(model), some)
        small = [some[seed % len(some)].take(8)]
        rough = measured_statistics(copy.deepcopy(model), small)
        Recalibration(teacher, small)(model)
        for name, layer in (("bn1", model.bn1), ("bn2", model.bn2)):
            plain += float((rough[name].variance / exact[name].variance).log().abs().mean())
            ours += float((layer.running_var / exact[name].variance).log().abs().mean())
    assert ours < 0.5 * plain


def test_statistics_without_a_scale_are_estimated_as_well() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)).eval()
    batch = Batch((torch.randn(64, 3),), {}, None, 64)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student[0].weight.mul_(2)  # type: ignore[union-attr, operator]
        student[0].bias.mul_(2)  # type: ignore[union-attr, operator]
    Recalibration(teacher, [batch])(student)
    torch.testing.assert_close(student[1].running_var, 4 * teacher[1].running_var)


def test_nothing_to_do_without_batchnorm() -> None:
    model = nn.Linear(3, 2)
    batch = Batch((torch.randn(4, 3),), {}, None, 4)
    Recalibration(model, [batch])(model)


def test_a_cut_batch_counts_as_what_it_is(trained: nn.Module, some: list[Batch]) -> None:
    model = copy.deepcopy(trained)
    seen: list[torch.Tensor] = []
    model.bn1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    statistics = measured_statistics(model, [some[0], some[1].take(2)])
    total = sum(x.shape[0] for x in seen)
    mean = sum(x.mean((0, 2, 3)) * (x.shape[0] / total) for x in seen)
    variance = sum(x.var((0, 2, 3)) * (x.shape[0] / total) for x in seen)
    torch.testing.assert_close(statistics["bn1"].mean, mean)
    torch.testing.assert_close(statistics["bn1"].variance, variance)


def test_a_layer_may_be_called_with_a_named_input() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(input=x)

    x = torch.randn(32, 4)
    statistics = measured_statistics(Named().eval(), [Batch((x,), {}, None, 32)])
    torch.testing.assert_close(statistics["norm"].mean, x.mean(0))
