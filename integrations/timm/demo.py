"""The demo: a small timm ResNet is trained on real images, quantized, saved, loaded and compared."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hq_plugin
from hq_plugin.config import Config
from hq_plugin.distillation import kl_divergence
from hq_plugin.errors import ConfigError
from hq_plugin.integrations.timm.adapter import create_model, load
from hq_plugin.integrations.timm.demo_data import built_in
from hq_plugin.progress import progress
from hq_plugin.result import Result
from hq_plugin.seeding import seeded

BUDGET, ACTIVATION_BITS = "2.5bit", 4


@dataclass(frozen=True)
class Setting:
    """How long the demo trains on one data set."""

    float_epochs: int
    meta_steps: int
    finetune_steps: int


SETTINGS = {
    "digits": Setting(float_epochs=16, meta_steps=100, finetune_steps=400),
    "fashion-mnist": Setting(float_epochs=2, meta_steps=50, finetune_steps=300),
}


@dataclass(frozen=True)
class Row:
    """One line of the demo's table.

    Attributes:
        name: Of the model.
        accuracy: On the test images, 0 to 1.
        kl: KL divergence from the float model on the test images, nats an image.
        bits: Effective bits a weight.
        size: Bytes.
        seconds: What it took.
    """

    name: str
    accuracy: float
    kl: float
    bits: float
    size: int
    seconds: float


def run(
    data: str = "digits",
    directory: str | Path | None = None,
    show: bool | None = None,
    *,
    overwrite: bool = False,
) -> list[Row]:
    """Runs the demo.

    Args:
        data: `"digits"` or `"fashion-mnist"`.
        directory: Where the quantized model is saved; None uses a temporary directory.
        show: Whether to show progress bars; None on a terminal.
        overwrite: Whether a model saved there before is replaced.

    Returns:
        Float, uniform and hybrid, each measured on the test data; the hybrid one as it was loaded again.

    Raises:
        ConfigError: There is no such data set.
        DataError: The data set is not installed.
        ArtifactPathError: The directory holds something else, or cannot be written.
    """
    if data not in SETTINGS:
        raise ConfigError(f"There is no demo data {data!r}. Choose one of {', '.join(SETTINGS)}.")
    setting = SETTINGS[data]
    train_x, train_y, test_x, test_y = built_in(data)
    began = time.perf_counter()
    model = _train_float(train_x, train_y, setting.float_epochs, show)
    float_seconds = time.perf_counter() - began

    config = Config(
        effort="fast",
        activation_bits=ACTIVATION_BITS,
        meta_steps=setting.meta_steps,
        finetune_steps=setting.finetune_steps,
        progress=show,
    )
    dataset = TensorDataset(train_x, train_y)
    began = time.perf_counter()
    session = hq_plugin.meta_train(model, dataset, config=config)
    hybrid = session.quantize(BUDGET)
    hybrid_seconds = time.perf_counter() - began

    # Uniform gets the same number of training steps: plain quantization-aware training, no MetaQuantNet.
    began = time.perf_counter()
    policy = session.baselines(BUDGET)["uniform"]
    uniform = session.finetune(policy, start="float", steps=setting.meta_steps + setting.finetune_steps)
    uniform_seconds = time.perf_counter() - began

    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "model" if directory is None else Path(directory)
        hq_plugin.save(hybrid, target, overwrite=overwrite)
        loaded = load(target)
        files = sum(path.stat().st_size for path in target.iterdir())
    with torch.no_grad():
        if not torch.equal(loaded(test_x[:64]), hybrid(test_x[:64])):
            raise RuntimeError("The loaded model's outputs differ from the saved one's.")

    def measured(made: nn.Module) -> tuple[float, float]:
        return _accuracy(made, test_x, test_y), _divergence(made, model, test_x)

    results = cast(Result, hybrid.hq), cast(Result, uniform.hq)
    return [
        Row("float", *measured(model), 32.0, results[0].float_size, float_seconds),
        Row("uniform", *measured(uniform), results[1].effective_bits, results[1].size, uniform_seconds),
        Row("hybrid", *measured(loaded), results[0].effective_bits, results[0].size, hybrid_seconds),
        Row("hybrid, as files, with its report", *measured(loaded), results[0].effective_bits, files, 0.0),
    ]


def _train_float(x: Tensor, y: Tensor, epochs: int, show: bool | None) -> nn.Module:
    with seeded(0):
        model = create_model("resnet10t", in_chans=1, num_classes=10, channels=[16, 32, 64, 64], stem_width=16)
        batch = 64
        steps = epochs * (len(x) // batch)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        with progress(show) as bars:
            bar = bars.task("float training", total=steps)
            for _ in range(epochs):
                for rows in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
                    loss = F.cross_entropy(model(x[rows]), y[rows], label_smoothing=0.05)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.advance(loss=float(loss.detach()))
    return model.eval()


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    hits = [
        (model(part).argmax(1) == labels).sum() for part, labels in zip(x.split(500), y.split(500), strict=True)
    ]
    return float(torch.stack(hits).sum()) / len(y)


@torch.no_grad()
def _divergence(model: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    parts = [float(kl_divergence(model(part), teacher(part))) * len(part) for part in x.split(500)]
    return sum(parts) / len(x)
