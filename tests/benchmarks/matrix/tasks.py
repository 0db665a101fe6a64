"""Tasks: a float model, its data, and how closeness to it is measured.

Small networks are trained on Fashion-MNIST (`float_models.py`); the others bring their weights in packages. Test
data is seen by neither training nor search. Tasks on data that people bring themselves are in `own_data.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from hq_plugin import Config
from hq_plugin.integrations.timm.demo_data import fashion_mnist
from tests.benchmarks import language, sentences
from tests.benchmarks.float_models import float_model
from tests.benchmarks.matrix.measures import Classification, Language, Measure, Sentences
from tests.benchmarks.matrix.pictures import held_out_pictures, training_pictures
from tests.benchmarks.packaged import Missing, lite0, mobilenetv2

BUDGETS = ("2.2bit", "2.5bit", "3bit", "3.5bit", "4.5bit")
#: A budget that has inputs searched as well: 12.5 BitOps a multiply-accumulate; 3-bit weights and 4-bit inputs
#: are 12.
LIMITED = {
    "resnet20": "3bit + 97.3MBitOps",
    "mobilenetv3": "3bit + 24.9MBitOps",
    "vit": "3bit + 82.5MBitOps",
}

#: Plain training from weights rounded to second order ends no closer than from the nearest (docs/experiments.md).
NEAREST = {"rounding": "nearest"}


@dataclass(frozen=True)
class Task:
    """What is quantized, on what, and for how long.

    Attributes:
        name: The model's name in rows.
        model: The float model, in eval mode.
        data: Training data, as `hq_plugin.quantize` takes it.
        measure: Measures a model on test data.
        config: Options that all methods share.
        others: Those in which methods other than hq_plugin's come closer than in what it proposes for the model, or
            that are a part of how it trains.
        steps: Training steps of every method, meta-training included.
        meta: The part of them that hq_plugin spends on meta-training.
        evaluations: Policies that hq_plugin's search scores, and what EvoPress may spend.
        episodes: Policies that the HAQ agent tries.
        main: hq_plugin's block by default, on which claims are made.
        budgets: Budgets of the whole matrix.
    """

    name: str
    model: nn.Module
    data: Any
    measure: Measure
    config: Config
    steps: int = 300
    meta: int = 30
    evaluations: int = 150
    episodes: int = 300
    main: str = "hq_dense"
    budgets: tuple[str, ...] = BUDGETS
    others: Mapping[str, Any] = field(default_factory=dict)


def small(name: str) -> Task:
    """A small network on Fashion-MNIST; its 10,000 test images are the test data."""
    model = float_model(name)
    train_x, train_y, test_x, test_y = fashion_mnist()
    config = Config(effort="fast", batch_size=128)
    data = TensorDataset(train_x, train_y)
    measure, budgets = Classification(model, test_x, test_y), (*BUDGETS, LIMITED[name])
    return Task(name, model, data, measure, config, budgets=budgets, others=NEAREST)


def imagenet_weights(name: str, build: Callable[[], nn.Module]) -> Task:
    """An ImageNet network, by its fidelity on photographs."""
    model = build().to(memory_format=torch.channels_last)
    data = TensorDataset(training_pictures(model))
    measure = Classification(model, held_out_pictures(model), batch=60)
    config = Config(effort="fast", batch_size=16, holdout=48)
    work: dict[str, Any] = {"steps": 120, "meta": 12, "evaluations": 60, "episodes": 120}
    return Task(name, model, data, measure, config, main="hq_auto", others=NEAREST, **work)


def minilm() -> Task:
    """all-MiniLM-L6-v2, by its embeddings of sentences of a kind that training has not seen."""
    model, tokenizer = sentences.minilm()
    config = Config(effort="fast", processor=tokenizer)
    return Task(
        "minilm",
        model,
        sentences.calibration_text(),
        Sentences(model, tokenizer, sentences.held_out()),
        config,
        steps=240,
        meta=40,
        evaluations=60,
        episodes=120,
        main="hq_auto",
        # They do not count what embeddings add three times, and leave out too many columns.
        others={"embedding_columns": 1, "embedding_bits": (1, *config.weight_bits)},
    )


def smollm2() -> Task:
    """SmolLM2-135M: linear layers in groups of 64, for its weights were 4-bit in groups of 32 once."""
    model, tokenizer = language.smollm2()
    config = Config(
        effort="fast",
        group_size=language.GROUP,
        exclude=("model.embed_tokens", "lm_head"),
        processor=tokenizer,
    )
    return Task(
        "smollm2",
        model,
        language.read([language.MANUAL]),
        Language(model, language.windows(tokenizer)),
        config,
        steps=72,
        meta=12,
        evaluations=24,
        episodes=48,
        main="hq_auto",
        budgets=("2.75bit", "3bit", "3.5bit", "4bit", "4.5bit"),
    )


BUILDERS: dict[str, Callable[[], Task]] = {
    "resnet20": lambda: small("resnet20"),
    "mobilenetv3": lambda: small("mobilenetv3"),
    "vit": lambda: small("vit"),
    "mobilenetv2": lambda: imagenet_weights("mobilenetv2", mobilenetv2),
    "lite0": lambda: imagenet_weights("lite0", lite0),
    "minilm": minilm,
    "smollm2": smollm2,
}


def task(name: str, data: Path | None = None) -> Task:
    """Builds a task.

    Args:
        name: One of `BUILDERS`, `cifar10`, or `imagenet:` and the name of a timm model.
        data: Folder of CIFAR-10 or ImageNet.

    Raises:
        Missing: A package or data is not there; the message says how to get it.
        KeyError: There is no such task.
    """
    from tests.benchmarks.matrix import own_data

    try:
        if name == "cifar10":
            return own_data.cifar10(data)
        if name.startswith("imagenet:"):
            return own_data.imagenet(name.removeprefix("imagenet:"), data)
        if name not in BUILDERS:
            known = ", ".join([*BUILDERS, "cifar10", "imagenet:<timm model>"])
            raise KeyError(f"there is no model {name!r}; possible are {known}")
        return BUILDERS[name]()
    except FileNotFoundError as error:
        raise Missing(f"{error.filename} is missing: apt-get install fortunes debian-faq python3.11-doc") from None
