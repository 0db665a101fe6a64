"""Crops of photographs that installed packages bring: data for ImageNet models where ImageNet is not.

Training crops are of scikit-image's and scikit-learn's photographs and of every second one of foolbox's; test
crops are of the other half of foolbox's, which training never sees. There are too few for accuracy: fidelity is
what they measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tests.benchmarks.packaged import Missing, package_folder

#: Package, folder in it, and its photographs; a pattern where all are.
SOURCES = {
    "skimage": ("data", ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "foolbox": ("data", ("imagenet_*.jpg",)),
}
INSTALL = {"skimage": "scikit-image", "sklearn": "scikit-learn", "foolbox": "foolbox"}
#: Pixels of a crop: fewer than the 224 that the networks were trained with, for time.
SIZE = 160
TRAIN, TEST = 800, 240


def paths() -> tuple[list[Path], list[Path]]:
    """Returns the photographs for training and for tests.

    Raises:
        Missing: A package is not installed.
    """
    found: dict[str, list[Path]] = {}
    for package, (folder, names) in SOURCES.items():
        root = package_folder(package, INSTALL[package]) / folder
        found[package] = [path for name in names for path in sorted(root.glob(name))]
    labelled = found["foolbox"]
    if len(labelled) < 2:
        raise Missing("foolbox brings no photographs here: pip install --no-deps foolbox==3.3.4")
    return [*found["skimage"], *found["sklearn"], *labelled[::2]], labelled[1::2]


def crops(files: Sequence[Path], count: int, seed: int, model: Any, size: int = SIZE) -> Tensor:
    """Returns random crops, mirrored every second time, normalised as a timm model wants them.

    Args:
        files: Photographs; each gives as many crops as the others.
        count: How many crops.
        seed: Of their places.
        model: A timm model, whose configuration has mean and standard deviation.
        size: Pixels of a side.

    Returns:
        `[count, 3, size, size]`, in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    images = [_read(path) for path in files]
    made = []
    for number in range(count):
        image = images[number % len(images)]
        share, down, right, flip = torch.rand(4, generator=generator).tolist()
        side = round(min(image.shape[1:]) * (0.35 + 0.65 * share))
        top, left = round(down * (image.shape[1] - side)), round(right * (image.shape[2] - side))
        part = image[None, :, top : top + side, left : left + side]
        part = F.interpolate(part, (size, size), mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
        made.append(((part.flip(2) if flip < 0.5 else part) - mean) / std)
    return torch.stack(made)[torch.randperm(count, generator=generator)]


def _read(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
