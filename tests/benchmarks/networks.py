"""The float networks of the benchmarks: a CIFAR-style ResNet-20 and a depthwise MobileNetV3.

Both take Fashion-MNIST images `[samples, 1, 28, 28]` and give ten class scores.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected by a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet20(nn.Module):
    """The ResNet-20 of He et al. (arXiv:1512.03385, section 4.2), with half of its width and one channel in."""

    def __init__(self, width: int = 8, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage in range(3):
            outputs = width * 2**stage
            for block in range(3):
                blocks.append(BasicBlock(inputs, outputs, stride=2 if stage and not block else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class MobileNetV3(nn.Module):
    """timm's `mobilenetv3_small_050` from scratch, on images that zeros pad from 28 to 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        import timm

        self.net = timm.create_model("mobilenetv3_small_050", pretrained=False, in_chans=1, num_classes=10)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.pad(x, (2, 2, 2, 2)))


#: The networks by name.
NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet20": ResNet20, "mobilenetv3": MobileNetV3}
