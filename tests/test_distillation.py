from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hq_plugin import ModelError, distillation
from hq_plugin.distillation import (
    Fidelity,
    RelativeError,
    class_scores,
    kl_divergence,
    loss_function,
    loss_name,
    random_probe,
    training_loss,
)


def test_kl_by_hand() -> None:
    teacher, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]]).log_softmax(-1)
    p = torch.tensor([0.5, 0.5])
    assert float(kl_divergence(student, teacher)) == pytest.approx(float((p * (p.log() - student[0])).sum()))
    assert float(kl_divergence(teacher, teacher)) == 0.0


def test_hidden_states_count_most() -> None:
    hidden, pooled = torch.randn(2, 5, 8), torch.randn(2, 8)
    teacher = {"last_hidden_state": hidden, "pooler_output": pooled}
    near = {"last_hidden_state": hidden + 1, "pooler_output": pooled}
    pooler = {"last_hidden_state": hidden, "pooler_output": pooled + 1}
    error = RelativeError([teacher])
    one, other = float(error(near, teacher)), float(error(pooler, teacher))
    assert one == pytest.approx(1 / 1.1 / float(hidden.var(correction=0)), rel=1e-4)
    assert other == pytest.approx(0.1 / 1.1 / float(pooled.var(correction=0)), rel=1e-4)
    # Without that name all count alike.
    alike = RelativeError([(hidden, pooled)])((hidden, pooled + 1), (hidden, pooled))
    assert float(alike) == pytest.approx(0.5 / float(pooled.var(correction=0)), rel=1e-4)


def test_relative_error_is_free_of_scale() -> None:
    t, s = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    scaled = RelativeError([t * 100])(s * 100, t * 100)
    assert float(RelativeError([t])(s, t)) == pytest.approx(float(scaled), rel=1e-4)


def test_a_batch_of_one_sample_counts_as_one_sample() -> None:
    t = torch.randn(65, 1)
    s = t + 0.03 * torch.randn(65, 1)
    distances = []
    for parts in ((64, 1), (33, 32)):
        loss = loss_function("auto", *t.split(parts))
        fidelity = Fidelity(loss)
        for mine, theirs in zip(s.split(parts), t.split(parts), strict=True):
            fidelity.update(mine, theirs, None, len(mine))
        distances.append(fidelity.distance)
    assert distances[0] == pytest.approx(distances[1], rel=1e-4)
    assert distances[0] == pytest.approx(float((s - t).square().mean() / t.var(correction=0)), rel=1e-4)


def test_what_auto_takes() -> None:
    logits = torch.randn(4, 10)
    assert loss_function("auto", logits) is loss_function("kl", logits)
    assert loss_function("auto", {"logits": torch.randn(2, 3, 10)}) is loss_function("kl", logits)
    assert loss_function("auto", SimpleNamespace(logits=logits)) is loss_function("kl", logits)
    for other in (
        torch.randn(4, 3, 8, 8),
        torch.randn(4, 1),
        SimpleNamespace(logits=torch.randn(4, 1)),
        {"logits": torch.randn(4, 1, 8, 8)},
        (torch.randn(4, 3), torch.randn(4)),
        {"x": torch.randn(3, 4)},
    ):
        assert isinstance(loss_function("auto", other), RelativeError)
    own = lambda s, t: (s - t).abs().mean()  # noqa: E731
    assert loss_function(own, logits) is own


def test_mistakes() -> None:
    with pytest.raises(ModelError, match="class scores"):
        loss_function("kl", torch.randn(4, 3, 8, 8))
    with pytest.raises(ModelError, match="no floating-point tensor"):
        RelativeError([])(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long))


def test_classes_of_pixels_are_compared() -> None:
    teacher = SimpleNamespace(logits=torch.randn(2, 5, 8, 3))
    # The same for all columns of a picture, and another class nearly everywhere.
    student = SimpleNamespace(logits=teacher.logits + 3 * torch.randn(2, 5, 8, 1))
    fidelity = Fidelity(loss_function("auto", teacher))
    labels = teacher.logits.argmax(1)
    fidelity.update(student, teacher, labels, 2)
    assert fidelity.distance > 0.5
    assert fidelity.agreement is not None
    assert fidelity.agreement < 0.6
    assert fidelity.accuracy == fidelity.agreement


def test_what_a_squared_error_makes_of_errors_is_not_what_a_divergence_does() -> None:
    # Softmax of such scores has no gradient to speak of; their squared error bends alike everywhere.
    scores = (100 * torch.randn(64, 4)).requires_grad_(True)
    probe, positions = random_probe(scores, loss_function("mse", scores.detach()), torch.Generator().manual_seed(0))
    probe.backward()
    assert positions == 64
    assert int((scores.grad.abs().sum(1) > 1e-3).sum()) == 64


def test_fidelity_counts_over_batches() -> None:
    teacher = torch.eye(4) * 9
    student = teacher.clone()
    student[0] = student[0].roll(1)
    fidelity = Fidelity(loss_function("kl", teacher))
    fidelity.update(student[:3], teacher[:3], torch.tensor([0, 1, 2]), 3)
    fidelity.update(student[3:], teacher[3:], torch.tensor([0]), 1)
    assert fidelity.agreement == 0.75
    assert fidelity.accuracy == 0.5
    assert fidelity.distance == pytest.approx(float(kl_divergence(student, teacher)))


def test_not_finite_is_the_worst() -> None:
    teacher = torch.randn(2, 3)
    fidelity = Fidelity(loss_function("kl", teacher))
    fidelity.update(torch.full((2, 3), float("nan")), teacher, None, 2)
    assert fidelity.distance == float("inf")
    assert fidelity.accuracy is None
    assert class_scores(torch.zeros(3)) is None


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_and_its_gradient_are_those_of_the_definition(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "_CHUNK", 20)  # several chunks, the last one short
    torch.manual_seed(0)
    student = torch.randn(3, 5, 7, dtype=torch.double, requires_grad=True)
    teacher = torch.randn(3, 5, 7, dtype=torch.double)
    loss = kl_divergence(student, teacher, temperature)
    (found,) = torch.autograd.grad(3 * loss, student)
    soft_student, soft_teacher = student.flatten(0, 1) / temperature, teacher.flatten(0, 1) / temperature
    log_student, log_teacher = soft_student.log_softmax(-1), soft_teacher.log_softmax(-1)
    expected = nn.functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    expected = expected * temperature**2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, torch.autograd.grad(3 * expected, student)[0])
    assert kl_divergence(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_training_softens_scores_and_nothing_else() -> None:
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    soft = training_loss(loss_function("auto", teacher), 3.0)
    assert torch.equal(soft(student, teacher), kl_divergence(student, teacher, 3.0))
    error = RelativeError([teacher])
    assert training_loss(error, 3.0) is error


def test_losses_have_names_for_reports() -> None:
    def my_loss(student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).abs().mean()

    scores, image = torch.zeros(2, 10), torch.zeros(2, 3, 4, 4)
    assert loss_name(loss_function("auto", scores)) == "KL divergence"
    assert loss_name(loss_function("auto", image)) == "relative squared error"
    assert loss_name(loss_function(my_loss, scores)) == "my_loss"
    assert loss_name(lambda student, teacher: student.sum()) == "custom loss"
    assert loss_name(nn.MSELoss()) == "MSELoss"
