"""Fashion-MNIST as the benchmarks use it: shuffled batches of 128 in memory, and the test images."""

from __future__ import annotations

from functools import cache

from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from hq_plugin.integrations.timm.demo_data import fashion_mnist

BATCH = 128

arrays = cache(fashion_mnist)


def training_loader() -> DataLoader:
    """Returns the training images and labels in shuffled batches, without augmentation."""
    images, labels, _, _ = arrays()
    return DataLoader(TensorDataset(images, labels), batch_size=BATCH, shuffle=True)


def test_set() -> tuple[Tensor, Tensor]:
    """Returns the 10,000 test images and their labels. No method ever sees them."""
    _, _, images, labels = arrays()
    return images, labels
