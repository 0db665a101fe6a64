"""Pictures that installed packages bring: data for ImageNet models where ImageNet is not.

Training pictures are Tux Paint's stamps (photographs and drawings of some 550 things, cut out) on crops of other
photographs. Training on crops of a dozen photographs alone does not do: what 1,000 classes need wears down (a KL of
0.3 on other crops of the same photographs, of 3.6 on photographs not seen). Test pictures are crops of foolbox's 20
photographs from ImageNet, which training never sees. There are too few for accuracy: fidelity is what they measure.
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
PHOTOGRAPHS = {
    "skimage": ("data", ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "foolbox": ("data", ("imagenet_*.jpg",)),
}
INSTALL = {"skimage": "scikit-image", "sklearn": "scikit-learn", "foolbox": "foolbox"}
STAMPS = Path("/usr/share/tuxpaint/stamps")
#: Stamps of letters and signs, which are left out.
SIGNS = "symbols"
#: Pixels of a picture: fewer than the 224 that the networks were trained with, for time.
SIZE = 160
TRAIN, TEST = 1200, 240
#: Width of a stamp in the picture, as a share of the picture's.
STAMP = (0.5, 1.0)


def photographs(package: str) -> list[Tensor]:
    """Returns a package's photographs, `[3, height, width]` from 0 to 1.

    Raises:
        Missing: The package is not installed.
    """
    folder, names = PHOTOGRAPHS[package]
    root = package_folder(package, INSTALL[package]) / folder
    found = [_read(path)[:3] for name in names for path in sorted(root.glob(name))]
    if not found:
        raise Missing(f"{package} brings no photographs here: pip install --no-deps {INSTALL[package]}")
    return found


def training_pictures(model: Any, count: int = TRAIN, seed: int = 0, size: int = SIZE) -> Tensor:
    """Returns stamps on crops of photographs, normalised as a timm model wants them.

    Args:
        model: A timm model, whose configuration has mean and standard deviation.
        count: How many; stamps come again once each had its turn.
        seed: Of what is drawn.
        size: Pixels of a side.

    Returns:
        `[count, 3, size, size]`, in random order.

    Raises:
        Missing: A package is not installed.
    """
    paths = sorted(path for path in STAMPS.rglob("*.png") if SIGNS not in path.parts)
    if not paths:
        raise Missing("Tux Paint's stamps are not here: apt-get install tuxpaint-stamps-default")
    grounds = [*photographs("skimage"), *photographs("sklearn")]
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in torch.randperm(len(paths), generator=generator).repeat(-(-count // len(paths)))[:count].tolist():
        picture = _crop(grounds[len(made) % len(grounds)], size, generator)
        made.append(_stamped(picture, _read(paths[number]), generator))
    return _shuffled(made, model, generator)


def held_out_pictures(model: Any, count: int = TEST, seed: int = 1, size: int = SIZE) -> Tensor:
    """Returns crops of photographs that training does not see; arguments and result as `training_pictures`."""
    images, generator = photographs("foolbox"), torch.Generator().manual_seed(seed)
    return _shuffled([_crop(images[n % len(images)], size, generator) for n in range(count)], model, generator)


def _crop(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Cuts a square of random place and size out of a photograph."""
    share, down, right, flip = torch.rand(4, generator=generator).tolist()
    side = round(min(image.shape[1:]) * (0.35 + 0.65 * share))
    top, left = round(down * (image.shape[1] - side)), round(right * (image.shape[2] - side))
    part = _resized(image[:, top : top + side, left : left + side], (size, size))
    return part.flip(2) if flip < 0.5 else part


def _stamped(picture: Tensor, stamp: Tensor, generator: torch.Generator) -> Tensor:
    """Puts a stamp, whose fourth channel is its opacity, at a random place on a picture."""
    share, down, right, flip = torch.rand(4, generator=generator).tolist()
    size = picture.shape[1]
    longest = size * (STAMP[0] + (STAMP[1] - STAMP[0]) * share)
    height, width = (max(1, round(side * longest / max(stamp.shape[1:]))) for side in stamp.shape[1:])
    stamp = _resized(stamp.flip(2) if flip < 0.5 else stamp, (height, width))
    top, left = round(down * (size - height)), round(right * (size - width))
    ground = picture[:, top : top + height, left : left + width]
    ground.lerp_(stamp[:3], stamp[3:])
    return picture


def _resized(image: Tensor, size: Sequence[int]) -> Tensor:
    made = F.interpolate(image[None], tuple(size), mode="bicubic", antialias=True, align_corners=False)
    return made[0].clamp(0, 1)


def _shuffled(pictures: Sequence[Tensor], model: Any, generator: torch.Generator) -> Tensor:
    """Returns pictures in random order, normalised as the model wants them."""
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (torch.stack(list(pictures))[torch.randperm(len(pictures), generator=generator)] - mean) / std


def _read(path: Path) -> Tensor:
    """Returns a picture with its opacity, `[4, height, width]`."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1).float() / 255
