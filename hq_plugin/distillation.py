"""The float model as the teacher: losses between two outputs, and measures of how close they are.

Outputs may be tensors, tuples, dicts or objects with `logits`. Nothing here runs a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hq_plugin.errors import ConfigError, ModelError

LossFunction = Callable[[Any, Any], Tensor]


def tensors_of(output: Any) -> list[Tensor]:
    """Returns the floating-point tensors in an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in tensors_of(part)]
    return []


def class_scores(output: Any) -> Tensor | None:
    """Returns the class scores in an output, `[..., classes]`, or None if it has none.

    These are `output.logits` or `output["logits"]`, whose classes are the last dimension, or the second of four
    (pictures: one class a pixel), or an output that is one tensor `[samples, classes]`. There are at least two
    classes: one number is what a regression says.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    scores = output if isinstance(output, Tensor) and output.dim() == 2 else logits
    if not isinstance(scores, Tensor):
        return None
    scores = scores.movedim(1, -1) if scores.dim() == 4 else scores
    return scores if scores.dim() > 1 and scores.shape[-1] > 1 else None


def hits(scores: Tensor, labels: Tensor) -> Tensor | None:
    """Returns which of the labelled predictions are right; None where labels do not fit them.

    Args:
        scores: `[..., classes]`.
        labels: Whole numbers `[...]` or `[..., 1]`; what is negative is no label.
    """
    chosen = scores.argmax(-1)
    labels = labels.squeeze(-1) if labels.shape == (*chosen.shape, 1) else labels
    return None if labels.shape != chosen.shape else (chosen == labels)[labels >= 0]


#: Elements of class scores worked on at once: a vocabulary has tens of thousands of them for each token.
_CHUNK = 1 << 22


class _KLDivergence(torch.autograd.Function):
    """KL divergence by chunks of rows, whose gradient is taken on the way: one tensor is kept."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        rows = max(1, _CHUNK // max(1, student.shape[1]))
        needed = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student) if needed else None
        total = torch.zeros((), dtype=torch.float64 if student.dtype == torch.float64 else torch.float32)
        total = total.to(student.device)
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            wide = torch.promote_types(student.dtype, torch.float32)
            log_student = F.log_softmax(student[part].to(wide) / temperature, dim=-1)
            log_teacher = F.log_softmax(teacher[part].to(wide) / temperature, dim=-1)
            share = log_teacher.exp()
            # A class that both rule out (a score of -inf) adds nothing: 0 log 0 is 0.
            apart = torch.where(share > 0, log_teacher - log_student, 0.0)
            total += torch.sum(share * apart) * temperature**2
            if gradient is not None:
                gradient[part] = log_student.exp_().sub_(share).mul_(temperature)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.rows = max(1, len(student))
        return total / ctx.rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (grads[0] / ctx.rows).to(gradient.dtype), None, None


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) in nats, the mean over samples. No gradient reaches the teacher.

    Args:
        student: Class scores `[..., classes]`.
        teacher: Class scores of the same shape.
        temperature: Both are divided by it, and the divergence multiplied by its square, which keeps gradients as
            large as they are at 1 (Hinton et al., arXiv:1503.02531, section 2).
    """
    divergence: Tensor = _KLDivergence.apply(student.flatten(0, -2), teacher.detach().flatten(0, -2), temperature)
    return divergence


def _sampled_cross_entropy(scores: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Returns the summed cross-entropy of labels drawn from the scores' own distribution.

    Its gradients' second moments are the Fisher information, which for a divergence from the network's own output
    is the Hessian.

    Args:
        scores: Class scores `[..., classes]`.
        generator: Draws the labels; None is torch's own.
    """
    flat = scores.float().flatten(0, -2)
    labels = torch.multinomial(flat.detach().softmax(-1), 1, generator=generator).squeeze(1)
    return F.cross_entropy(flat, labels, reduction="sum")


#: The least variance by which an error is divided.
_LEAST_VARIANCE = 1e-12


def variances(outputs: Sequence[Any]) -> list[float]:
    """Returns the variance of each floating tensor of a model's output over several of its outputs."""
    parts = [[tensor.detach().float().flatten() for tensor in tensors_of(output)] for output in outputs]
    alike = [part for part in parts if len(part) == len(parts[0])]
    joined = [torch.cat(same) for same in zip(*alike, strict=True)]
    return [float(x.var(correction=0).clamp_min(_LEAST_VARIANCE)) if x.numel() else 1.0 for x in joined]


#: What each further tensor of an output counts beside its `last_hidden_state`.
_BESIDE = 0.1


class RelativeError:
    """Squared error over the teacher's variance, the mean over the floating tensors of an output.

    Where one of them is `last_hidden_state`, it counts ten times as much as each of the others: a pooler that
    nobody may ever have trained (BERT's, of sentence encoders) is not to have half of the say.

    Args:
        examples: Outputs of the teacher, by whose variance errors are divided: that of one batch may be of one
            sample, and have none.
    """

    def __init__(self, examples: Sequence[Any]) -> None:
        self.variances = variances(examples)

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        """Returns the error, a scalar.

        Raises:
            ModelError: The output holds no floating tensor.
        """
        pairs = list(zip(tensors_of(student), tensors_of(teacher), strict=True))
        if not pairs:
            raise ModelError(
                f"The model's output ({type(teacher).__name__}) holds no floating-point tensor to compare. "
                "Pass loss=<function of the student's and the teacher's output>."
            )
        _check_shapes(pairs)
        known = self.variances if len(self.variances) == len(pairs) else variances([teacher])
        errors = torch.stack(
            [
                (mine.float() - theirs.float()).square().mean() / variance
                for (mine, theirs), variance in zip(pairs, known, strict=True)
            ]
        )
        shares = torch.tensor(_shares(teacher, [theirs for _, theirs in pairs]), device=errors.device)
        return (errors * shares).sum()


def _check_shapes(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Checks that two outputs can be compared.

    Raises:
        ModelError: A tensor of one has another shape than that of the other.
    """
    for mine, theirs in pairs:
        if mine.shape != theirs.shape:
            raise ModelError(
                f"The quantized model's output has the shape {tuple(mine.shape)} where the float model's has "
                f"{tuple(theirs.shape)}: it hangs on the values, as a detector's does. Pass loss=<function of the "
                "student's and the teacher's output>, or quantize the part before it."
            )


def _shares(output: Any, tensors: list[Tensor]) -> list[float]:
    """Returns what each of the tensors of an output counts in its error, 1 in all."""
    main = output.get("last_hidden_state") if isinstance(output, Mapping) else None
    weights = [_BESIDE if isinstance(main, Tensor) and tensor is not main else 1.0 for tensor in tensors]
    return [weight / sum(weights) for weight in weights]


def random_probe(
    output: Any, loss: LossFunction | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, int]:
    """Returns a scalar whose gradients tell to second order what an output's distance to itself makes of errors.

    For a divergence of class scores it is the cross-entropy of labels drawn from them, for a squared error a
    product with random numbers. The mean over positions of half its squared directional derivative is then the
    KL divergence, or the relative squared error, of a small error in that direction (the Gauss-Newton matrix).
    What a function of the user's own makes of errors is not known: the divergence is taken in its place where
    there are class scores.

    Args:
        output: Of a network that is differentiated.
        loss: The distance; None is what suits the output.
        generator: Draws what is random; None is torch's own.

    Returns:
        The scalar, summed over positions, and their number; 0 and 1 where the output holds no tensor.
    """
    squared = isinstance(loss, RelativeError)
    scores = None if squared else class_scores(output)
    if scores is not None:
        return _sampled_cross_entropy(scores, generator), scores.shape[:-1].numel()
    tensors = tensors_of(output)
    known = loss.variances if isinstance(loss, RelativeError) else []
    known = known if len(known) == len(tensors) else variances([output])
    shares = _shares(output, tensors)
    positions = max((tensor.shape[:-1].numel() for tensor in tensors if tensor.numel()), default=1)
    total = torch.zeros((), device=tensors[0].device) if tensors else torch.zeros(())
    for tensor, share, variance in zip(tensors, shares, known, strict=True):
        if tensor.numel():
            noise = torch.randn(tensor.shape, generator=generator, device=tensor.device)
            scale = 2 * share * positions / (tensor.numel() * variance)
            total = total + math.sqrt(scale) * (tensor.float() * noise).sum()
    return total, positions


def loss_function(loss: str | LossFunction, *examples: Any) -> LossFunction:
    """Returns the distillation loss that fits examples of the teacher's output.

    Args:
        loss: `"auto"`, `"kl"`, `"mse"` or a function, which is returned as it is.
        examples: Outputs of the teacher, one at least.

    Raises:
        ModelError: `"kl"` is asked for, but the output holds no class scores.
        ConfigError: The function returns something else than one number.
    """
    if not isinstance(loss, str):
        with torch.no_grad():
            value = loss(examples[0], examples[0])
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ConfigError(
                f"loss returned {got}. It takes the outputs of student and teacher and returns one number."
            )
        return loss
    scores = class_scores(examples[0])
    if loss == "kl" and scores is None:
        raise ModelError('loss="kl" needs class scores: an output [samples, classes], or with `.logits`.')
    if loss == "mse" or scores is None:
        return RelativeError(examples)
    return _kl_of_outputs


def training_loss(loss: LossFunction, temperature: float) -> LossFunction:
    """Returns what training minimises where a distance is measured: a KL divergence at a temperature.

    Args:
        loss: The distance; one that is no KL divergence is returned as it is.
        temperature: Divides class scores.
    """
    return partial(_kl_of_outputs, temperature=temperature) if loss is _kl_of_outputs else loss


def loss_name(loss: LossFunction) -> str:
    """Returns what a distillation loss is called in reports."""
    if loss is _kl_of_outputs:
        return "KL divergence"
    if isinstance(loss, RelativeError):
        return "relative squared error"
    name = str(getattr(loss, "__name__", type(loss).__name__))
    return "custom loss" if name == "<lambda>" else name


def _kl_of_outputs(student: Any, teacher: Any, temperature: float = 1.0) -> Tensor:
    student_scores, teacher_scores = class_scores(student), class_scores(teacher)
    assert student_scores is not None
    assert teacher_scores is not None
    _check_shapes([(student_scores, teacher_scores)])
    return kl_divergence(student_scores, teacher_scores, temperature)


@dataclass
class Fidelity:
    """Running means of how close a model is to its teacher, over batches.

    Attributes:
        loss_function: The distance that is averaged over samples.
        distance: Mean distance so far.
        agreement: Share of predictions on which both choose the same class, or None.
        accuracy: Share of labelled samples that the student gets right, or None.
    """

    loss_function: LossFunction
    _total: float = 0.0
    _samples: int = 0
    _counts: dict[str, list[int]] = field(default_factory=dict)

    def update(self, student: Any, teacher: Any, labels: Tensor | None, samples: int) -> None:
        """Adds one batch of `samples` samples."""
        self._total += float(self.loss_function(student, teacher)) * samples
        self._samples += samples
        scores, expected = class_scores(student), class_scores(teacher)
        if scores is None or expected is None:
            return
        self._count("agreement", scores.argmax(-1) == expected.argmax(-1))
        right = None if labels is None else hits(scores, labels)
        if right is not None:
            self._count("accuracy", right)

    def _count(self, name: str, right: Tensor) -> None:
        counts = self._counts.setdefault(name, [0, 0])
        counts[0] += int(right.sum())
        counts[1] += right.numel()

    def _share(self, name: str) -> float | None:
        right, total = self._counts.get(name, (0, 0))
        return right / total if total else None

    @property
    def distance(self) -> float:
        """Mean distance; infinite where the student's outputs were not finite."""
        mean = self._total / max(self._samples, 1)
        return mean if math.isfinite(mean) else float("inf")

    @property
    def agreement(self) -> float | None:
        """Share of predictions on which student and teacher agree."""
        return self._share("agreement")

    @property
    def accuracy(self) -> float | None:
        """Share of labelled samples that the student gets right."""
        return self._share("accuracy")
