"""Trains the float networks once, and keeps them in a cache.

python -m tests.benchmarks.float_models [resnet20] [mobilenetv3] [vit]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hq_plugin.integrations.timm.demo_data import fashion_mnist
from tests.benchmarks.networks import new

CACHE = Path(os.environ.get("HQ_BENCH_CACHE", ".cache/benchmarks"))
EPOCHS = {"resnet20": 8, "mobilenetv3": 4, "vit": 10}
#: Peak learning rates of AdamW; the ResNet is trained by SGD.
PEAKS = {"mobilenetv3": 5e-3, "vit": 2e-3}
BATCH = 128


def float_model(name: str) -> nn.Module:
    """Returns a trained network in eval mode, from the cache if it is there."""
    path = CACHE / f"{name}.safetensors"
    model = new(name)
    if not path.exists():
        _train(name, model)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, partial)
        partial.rename(path)
    model.load_state_dict(load_file(path))
    # Several times as fast as contiguous tensors for small convolutions on a CPU.
    return model.to(memory_format=torch.channels_last).eval()


def _train(name: str, model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)
    train_x, train_y, test_x, test_y = fashion_mnist()
    steps = len(train_x) // BATCH
    if name == "resnet20":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True
        )
        peak = 0.2
    else:
        optimizer, peak = torch.optim.AdamW(model.parameters(), weight_decay=0.01), PEAKS[name]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=EPOCHS[name] * steps)
    for epoch in range(EPOCHS[name]):
        began = time.perf_counter()
        model.train()
        for rows in torch.randperm(len(train_x))[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(model(_augment(train_x[rows], 0 if name == "vit" else 2)), train_y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(
            f"{name} epoch {epoch}: {accuracy(model, test_x, test_y):.4f}, {time.perf_counter() - began:.0f} s",
            flush=True,
        )


def _augment(x: Tensor, shift: int) -> Tensor:
    """Shifts a batch by up to some pixels (which patches of four take amiss), and mirrors every second one."""
    if torch.rand(()) < 0.5:
        x = x.flip(3)
    down, right = torch.randint(-shift, shift + 1, (2,)).tolist()
    return torch.roll(x, (down, right), (2, 3))


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Returns top-1 accuracy in eval mode."""
    model.eval()
    hits = sum(
        int((model(part).argmax(1) == labels).sum())
        for part, labels in zip(x.split(1000), y.split(1000), strict=True)
    )
    return hits / len(y)


if __name__ == "__main__":
    _, _, images, classes = fashion_mnist()
    for wanted in sys.argv[1:] or list(EPOCHS):
        print(f"{wanted}: {accuracy(float_model(wanted), images, classes):.4f}")
