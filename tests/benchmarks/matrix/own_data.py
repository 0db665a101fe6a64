"""Tasks for people who have the data: CIFAR-10 and ImageNet, with the networks that the literature compares on.

    python -m tests.benchmarks --models cifar10 --data ~/data/cifar10 --seeds 0 1 2
    python -m tests.benchmarks --models imagenet:resnet18 imagenet:mobilenetv2_100 --data ~/data/imagenet

The protocol is the usual one of the papers that compare on these: one float network, a hybrid policy under a
budget, retraining with augmented images (shifted by up to four pixels and mirrored; random resized crops), top-1
accuracy on the whole test set (CIFAR-10) or validation set (ImageNet). The number of retraining steps is what
`--steps` says, the same for all methods.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hq_plugin import Config
from tests.benchmarks.float_models import CACHE
from tests.benchmarks.matrix.measures import Classification, Streamed
from tests.benchmarks.matrix.tasks import NEAREST, Task
from tests.benchmarks.networks import resnet20
from tests.benchmarks.packaged import Missing

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
#: Epochs of the float ResNet-20, and of retraining where `--steps` names no number.
CIFAR_EPOCHS, CIFAR_BATCH, CIFAR_STEPS = 160, 128, 6000
IMAGENET_BATCH, IMAGENET_STEPS = 128, 20_000


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Images that are shifted by up to four pixels and mirrored at random."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = F.pad(x, (4, 4, 4, 4)), y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        down, right, flip = torch.randint(0, 9, (3,)).tolist()
        image = self.x[index, :, down : down + 32, right : right + 32]
        return (image.flip(2) if flip % 2 else image), self.y[index]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _folder(data: Path | None, what: str) -> Path:
    if data is None:
        raise Missing(f"{what} is not in any package: name its folder with --data")
    return data.expanduser()


def cifar10(data: Path | None) -> Task:
    """ResNet-20 of width 16 (272,474 parameters) on CIFAR-10, trained here once if the cache has no weights.

    Args:
        data: Folder of `torchvision.datasets.CIFAR10`, which downloads into it what is missing.

    Raises:
        Missing: There is no folder, or the data cannot be had.
    """
    from torchvision.datasets import CIFAR10

    root = _folder(data, "CIFAR-10")
    try:
        parts = [CIFAR10(str(root), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise Missing(f"CIFAR-10 is not in {root} and cannot be downloaded: {error}") from error
    (train_x, train_y), (test_x, test_y) = ((_normalised(part), torch.tensor(part.targets)) for part in parts)
    model = _cifar_network(Augmented(train_x, train_y)).to(_device())
    measure = Classification(model, test_x.to(_device()), test_y.to(_device()))
    config = Config(effort="balanced", batch_size=CIFAR_BATCH)
    held = Augmented(train_x, train_y)
    work: dict[str, Any] = {"steps": CIFAR_STEPS, "meta": 600, "evaluations": 400, "episodes": 600}
    return Task("cifar10", model, held, measure, config, others=NEAREST, **work)


def _normalised(part: Any) -> Tensor:
    images = torch.from_numpy(part.data).permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def cifar_resnet20() -> nn.Sequential:
    """ResNet-20 of width 16 for three colours."""
    torch.manual_seed(0)
    network = resnet20(16)
    network[0] = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
    return network


def _cifar_network(data: Dataset[Any], epochs: int = CIFAR_EPOCHS) -> nn.Module:
    path = CACHE / "cifar10_resnet20.safetensors"
    model = cifar_resnet20()
    if not path.exists():
        model.to(_device())
        loader = DataLoader(data, CIFAR_BATCH, shuffle=True, drop_last=True)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / (epochs * len(loader))))
        )
        for epoch in range(epochs):
            for x, y in loader:
                loss = F.cross_entropy(model(x.to(_device())), y.to(_device()))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            print(f"cifar10, epoch {epoch + 1} of {epochs}: loss {float(loss):.3f}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, path)
    model.load_state_dict(load_file(path))
    return model.to(memory_format=torch.channels_last).eval()


def imagenet(name: str, data: Path | None) -> Task:
    """A pretrained timm network on ImageNet.

    Args:
        name: `resnet18`, `resnet50`, `mobilenetv2_100`, or any other with pretrained weights.
        data: Folder with `train/` and `val/`, a folder for each class in both.

    Raises:
        Missing: There is no such folder, or the weights cannot be had.
    """
    import timm
    from torchvision.datasets import ImageFolder

    root = _folder(data, "ImageNet")
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise Missing(f"{root} has no folder {part!r}: ImageNet is wanted as {root}/train and {root}/val")
    try:
        model = timm.create_model(name, pretrained=True).to(_device()).eval()
    except Exception as error:  # hub, network and file system each have errors of their own
        raise Missing(f"the pretrained weights of {name} cannot be had: {error}") from error
    settings = timm.data.resolve_model_data_config(model)
    train = ImageFolder(str(root / "train"), timm.data.create_transform(**settings, is_training=True))
    test = ImageFolder(str(root / "val"), timm.data.create_transform(**settings, is_training=False))
    loader = DataLoader(train, IMAGENET_BATCH, shuffle=True, num_workers=8)
    config = Config(effort="balanced", batch_size=IMAGENET_BATCH)
    return Task(
        f"imagenet:{name}",
        model,
        loader,
        Streamed(model, _OnDevice(DataLoader(test, IMAGENET_BATCH, num_workers=8))),
        config,
        steps=IMAGENET_STEPS,
        meta=2000,
        evaluations=400,
        episodes=600,
        main="hq_auto",
        others=NEAREST,
    )


class _OnDevice:
    """Batches of a loader on the device of the model, from the start each time."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Any:
        for x, y in self.loader:
            yield x.to(_device()), y.to(_device())


__all__ = ["Augmented", "cifar10", "imagenet"]
