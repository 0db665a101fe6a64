"""Trains the float networks of the benchmarks once; `float_model(name)` loads or trains one.

Run as `python -m tests.benchmarks.train_float [--epochs 12] [--threads 2] [resnet20 mobilenetv3 ...]`.
Every epoch leaves a checkpoint, from which a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hq_plugin.integrations.timm.demo_data import fashion_mnist
from tests.benchmarks.cache import cache_directory
from tests.benchmarks.networks import NETWORKS

EPOCHS, BATCH, SEED = 12, 128, 0


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: the optimizer, its peak rate, its weight decay."""

    optimizer: str
    learning_rate: float
    weight_decay: float

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        decay = [p for p in model.parameters() if p.dim() > 1]
        keep = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": self.weight_decay}, {"params": keep, "weight_decay": 0.0}]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.learning_rate, momentum=0.9, nesterov=True)
        return torch.optim.AdamW(groups, lr=self.learning_rate)


RECIPES = {
    "resnet20": Recipe("sgd", 0.1, 5e-4),
    "mobilenetv3": Recipe("adamw", 3e-3, 0.05),
}


def float_model(name: str) -> nn.Module:
    """Returns a trained float network in eval mode, from the cache if it is there."""
    path = cache_directory() / f"{name}.safetensors"
    model = NETWORKS[name]()
    if not path.exists():
        train(name)
    model.load_state_dict(load_file(path))
    return model.eval()


def train(name: str, epochs: int = EPOCHS) -> float:
    """Trains a network and caches its weights; returns its accuracy on the test images."""
    images, labels, test_images, test_labels = fashion_mnist()
    folder = cache_directory()
    checkpoint = folder / f"{name}.checkpoint.pt"
    torch.manual_seed(SEED)
    model = NETWORKS[name]().to(memory_format=torch.channels_last)
    recipe = RECIPES[name]
    optimizer = recipe.build(model)
    start = 0
    if checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]
    steps = len(images) // BATCH
    correct = 0.0
    for epoch in range(start, epochs):
        began = time.perf_counter()
        # A generator of its own for each epoch: going on from a checkpoint gives the same batches.
        generator = torch.Generator().manual_seed(1000 * SEED + epoch)
        order = torch.randperm(len(images), generator=generator)
        model.train()
        total = 0.0
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate(epoch * steps + step, epochs * steps)
            index = order[step * BATCH : (step + 1) * BATCH]
            loss = F.cross_entropy(model(augment(images[index], generator)), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        correct = test_accuracy(model, test_images, test_labels)
        seconds = time.perf_counter() - began
        print(
            f"{name} epoch {epoch + 1}/{epochs}: loss {total / steps:.4f}, test accuracy {correct:.4f}, "
            f"{seconds:.0f} s",
            flush=True,
        )
        partial = checkpoint.with_suffix(".partial")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, partial)
        partial.replace(checkpoint)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / f"{name}.safetensors")
    return correct or test_accuracy(model, test_images, test_labels)


def rate(step: int, steps: int, warmup: float = 0.15) -> float:
    """One cycle: the share of the peak rate at a step, up in a line and down in a cosine."""
    share = step / steps
    if share < warmup:
        return 0.1 + 0.9 * share / warmup
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts each image by up to two pixels each way, black outside, and flips every other one."""
    count, _, height, width = images.shape
    background = float(images.min())
    padded = F.pad(images, (2, 2, 2, 2), value=background)
    rows, columns = torch.randint(0, 5, (2, count, 1), generator=generator)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    y = (rows + torch.arange(height)).unsqueeze(2)
    x = columns + torch.arange(width)
    x = torch.where(flip, x.flip(1), x).unsqueeze(1)
    index = torch.arange(count).view(-1, 1, 1)
    return padded[index, 0, y, x].unsqueeze(1)


@torch.no_grad()
def test_accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Returns the share of the images that a model classifies right."""
    model.eval()
    hits = sum(
        int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return hits / len(labels)


def main() -> None:
    """Trains the networks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NETWORKS)}; all without a name")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.names or NETWORKS:
        if (cache_directory() / f"{name}.safetensors").exists():
            print(f"{name} is trained already: {cache_directory() / name}.safetensors")
        else:
            print(f"{name}: test accuracy {train(name, options.epochs):.4f}", flush=True)


if __name__ == "__main__":
    main()
