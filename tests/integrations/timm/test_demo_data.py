import gzip
from pathlib import Path

import pytest
import torch

from hq_plugin import ConfigError, DataError
from hq_plugin.integrations.timm import demo_data


def test_digits_are_split_and_normalised() -> None:
    train_x, train_y, test_x, test_y = demo_data.digits()
    assert (tuple(train_x.shape), tuple(test_x.shape)) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert (train_x.dtype, train_y.dtype) == (torch.float32, torch.int64)
    assert set(train_y.tolist()) == set(test_y.tolist()) == set(range(10))
    everything = torch.cat([train_x, test_x])
    torch.testing.assert_close((everything.mean(), everything.std()), (torch.tensor(0.0), torch.tensor(1.0)))


def _idx(path: Path, dimensions: list[int], values: bytes) -> None:
    header = bytes([0, 0, 8, len(dimensions)]) + b"".join(n.to_bytes(4, "big") for n in dimensions)
    path.write_bytes(gzip.compress(header + values))


def test_fashion_mnist_is_read_from_idx_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "FASHION_MNIST", tmp_path)
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        demo_data.fashion_mnist()
    for name, samples in (("train", 3), ("t10k", 2)):
        pixels = bytes(range(28)) * 28 * samples
        _idx(tmp_path / f"{name}-images-idx3-ubyte.gz", [samples, 28, 28], pixels)
        _idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", [samples], bytes([9] * samples))
    train_x, train_y, test_x, _ = demo_data.fashion_mnist()
    assert (tuple(train_x.shape), tuple(test_x.shape)) == ((3, 1, 28, 28), (2, 1, 28, 28))
    assert train_y.tolist() == [9, 9, 9]
    torch.testing.assert_close(train_x[2, 0, 5], (torch.arange(28) / 255 - 0.2860) / 0.3530)
    padded = demo_data.built_in("fashion-mnist")[0]
    assert tuple(padded.shape) == (3, 1, 32, 32)
    assert float(padded[0, 0, 0, 0]) == float(train_x.min())


def test_built_in_data_is_named() -> None:
    assert tuple(demo_data.built_in("digits")[0].shape) == (1437, 1, 16, 16)
    with pytest.raises(ConfigError, match="digits, fashion-mnist"):
        demo_data.built_in("imagenet")
