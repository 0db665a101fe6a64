"""What the benchmarks report of a model: how close it is to the float model, and its accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 500


@dataclass(frozen=True)
class Quality:
    """Measures over a test set.

    Attributes:
        kl: KL(float || model) in nats, the mean over images.
        agreement: Share of images on which both choose the same class.
        accuracy: Share of images that the model classifies right.
    """

    kl: float
    agreement: float
    accuracy: float


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Returns the class scores of all images, `[images, classes]`."""
    model.eval()
    return torch.cat([model(part) for part in images.split(BATCH)])


def quality(scores: Tensor, float_scores: Tensor, labels: Tensor) -> Quality:
    """Compares a model's class scores with the float model's; computed apart from the library's own code."""
    student, teacher = F.log_softmax(scores.double(), 1), F.log_softmax(float_scores.double(), 1)
    chosen = scores.argmax(1)
    return Quality(
        kl=float((teacher.exp() * (teacher - student)).sum(1).mean()),
        agreement=float((chosen == float_scores.argmax(1)).double().mean()),
        accuracy=float((chosen == labels).double().mean()),
    )
