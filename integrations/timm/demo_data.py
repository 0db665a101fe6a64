"""Small real image data for the demo and the benchmarks: scikit-learn's digits, and Fashion-MNIST."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hq_plugin.errors import ConfigError, DataError

#: Where Debian's package `dataset-fashion-mnist` puts its files; the environment may name another.
FASHION_MNIST = Path(os.environ.get("HQ_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))

Arrays = tuple[Tensor, Tensor, Tensor, Tensor]


def digits() -> Arrays:
    """Returns the 1,797 handwritten digits of scikit-learn, every fifth one as test data.

    Returns:
        Training images float32 `[samples, 1, 8, 8]`, normalised, and labels int64; test images and labels.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(raw.target, dtype=torch.int64)
    test = torch.arange(len(labels)) % 5 == 0
    return images[~test], labels[~test], images[test], labels[test]


def fashion_mnist() -> Arrays:
    """Returns Fashion-MNIST: 60,000 training and 10,000 test images of 10 kinds of clothing.

    Returns:
        Training images float32 `[60000, 1, 28, 28]`, normalised, and labels int64; test images and labels.

    Raises:
        DataError: The files are not installed.
    """
    parts = []
    for name in ("train", "t10k"):
        images, labels = _idx(f"{name}-images-idx3-ubyte.gz"), _idx(f"{name}-labels-idx1-ubyte.gz")
        parts += [(images.float().unsqueeze(1) / 255 - 0.2860) / 0.3530, labels.long()]
    return parts[0], parts[1], parts[2], parts[3]


#: The data sets that have a name, for the demo and the command line.
NAMES = ("digits", "fashion-mnist")


def built_in(name: str) -> Arrays:
    """Returns a data set as the demo's network takes it.

    Digits are enlarged to 16×16, Fashion-MNIST is padded to 32×32: residual networks halve sizes often.

    Args:
        name: `"digits"` or `"fashion-mnist"`.

    Returns:
        Training images float32 `[samples, 1, size, size]` and labels int64; test images and labels.

    Raises:
        ConfigError: There is no such data set.
        DataError: It is not installed.
    """
    if name not in NAMES:
        raise ConfigError(f"There is no built-in data {name!r}. Choose one of {', '.join(NAMES)}.")
    train_x, train_y, test_x, test_y = digits() if name == "digits" else fashion_mnist()

    def enlarge(x: Tensor) -> Tensor:
        if name == "digits":
            return F.interpolate(x, scale_factor=2.0, mode="bilinear")
        return F.pad(x, (2, 2, 2, 2), value=float(train_x.min()))

    return enlarge(train_x), train_y, enlarge(test_x), test_y


def _idx(name: str) -> Tensor:
    path = FASHION_MNIST / name
    if not path.exists():
        raise DataError(
            f"Fashion-MNIST is not there ({path}). On Debian: apt-get install dataset-fashion-mnist; or put its "
            "four .gz files anywhere and name the folder in HQ_FASHION_MNIST."
        )
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy())
