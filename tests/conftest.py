"""What several tests share: a small network, and real data for it (scikit-learn's digits)."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

# A shell that starts the tests in the background has them ignore Ctrl-C, and their children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class TinyNet(nn.Module):
    """A network with every usual difficulty in small: BatchNorm, a residual sum, a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        x = x + nn.functional.silu(self.bn2(self.depthwise(x)))
        x = nn.functional.adaptive_avg_pool2d(torch.relu(self.pointwise(x)), 2)
        return self.head(x.flatten(1))


SITES = ["stem", "depthwise", "pointwise", "head"]


def digits_batches(batch: int = 64) -> list[tuple[Tensor, Tensor]]:
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(raw.target)
    return list(zip(images.split(batch), labels.split(batch), strict=True))


@pytest.fixture(scope="session")
def batches() -> list[tuple[Tensor, Tensor]]:
    return digits_batches()


@pytest.fixture(scope="session")
def trained(batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """A TinyNet that knows the digits; tests must not change it."""
    torch.manual_seed(0)
    model = TinyNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(6):
        for x, y in batches[6:]:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@pytest.fixture
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return TinyNet().eval()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests keep their measurements of kernels to themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HQ_PLUGIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
