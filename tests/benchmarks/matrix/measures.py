"""How close a model is to its float teacher on test data that neither training nor search has seen.

Every measure gives `distance`, lower is better, by which methods are compared: the KL divergence where a model has
classes or tokens, and `1 - cosine` where it embeds sentences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hq_plugin.distillation import Fidelity, loss_function
from tests.benchmarks import language
from tests.benchmarks.sentences import closeness, embed

Measure = Callable[[nn.Module], dict[str, float | None]]


class Classification:
    """KL, top-1 agreement and, where there are labels, accuracy.

    Args:
        teacher: The float model.
        x: Test inputs.
        y: Their labels, or None.
        batch: Samples of a forward.
    """

    def __init__(self, teacher: nn.Module, x: Tensor, y: Tensor | None = None, batch: int = 500) -> None:
        labels = [None] * -(-len(x) // batch) if y is None else list(y.split(batch))
        self.batches = list(zip(x.split(batch), labels, strict=True))
        with torch.no_grad():
            self.targets = [teacher(part) for part, _ in self.batches]
        self.loss = loss_function("kl", self.targets[0])

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        fidelity = Fidelity(self.loss)
        for (x, y), target in zip(self.batches, self.targets, strict=True):
            fidelity.update(model(x), target, y, len(x))
        kl = fidelity.distance
        return {"distance": kl, "kl": kl, "agreement": fidelity.agreement, "accuracy": fidelity.accuracy}


class Streamed:
    """As `Classification`, for test data too large for memory: batches of images and labels, read each time."""

    def __init__(self, teacher: nn.Module, batches: Any) -> None:
        self.teacher, self.batches = teacher, batches

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        fidelity: Fidelity | None = None
        for x, y in self.batches:
            target = self.teacher(x)
            fidelity = fidelity or Fidelity(loss_function("kl", target))
            fidelity.update(model(x), target, y, len(x))
        assert fidelity is not None, "there is no test data"
        kl = fidelity.distance
        return {"distance": kl, "kl": kl, "agreement": fidelity.agreement, "accuracy": fidelity.accuracy}


class Language:
    """KL a token, top-1 agreement and perplexity on windows of text."""

    def __init__(self, teacher: nn.Module, text: Tensor) -> None:
        self.teacher, self.text = teacher, text

    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        found = language.measure(model, self.teacher, self.text)
        return {"distance": found["kl"], **found}


class Sentences:
    """Mean cosine between embeddings and the float ones, and Spearman's correlation of all pairs' similarities."""

    def __init__(self, teacher: nn.Module, tokenizer: Any, sentences: list[str]) -> None:
        self.tokenizer, self.sentences = tokenizer, sentences
        self.expected = embed(teacher, tokenizer, sentences)

    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        found = closeness(embed(model, self.tokenizer, self.sentences), self.expected)
        return {"distance": 1 - found["cosine"], **found}
