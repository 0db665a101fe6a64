"""The networks of the benchmarks, for Fashion-MNIST's 1×28×28 images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A basic residual block; where the shape changes, the shortcut is a 1×1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU()
        self.short = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(y)) + self.short(x))


def resnet20(width: int = 8) -> nn.Sequential:
    """A CIFAR-style ResNet-20; 68,642 parameters at width 8."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage, outputs in enumerate((width, 2 * width, 4 * width)):
        for number in range(3):
            layers.append(Block(inputs, outputs, 2 if stage and number == 0 else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


class Padded(nn.Module):
    """A network for 32×32 images, fed with 28×28 ones."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(F.pad(x, (2, 2, 2, 2), value=-0.81))


def depthwise() -> nn.Module:
    """timm's mobilenetv3_small_050, its stem at stride 1, since the images are small."""
    import timm  # here: a ResNet-20 needs torch alone

    network = timm.create_model("mobilenetv3_small_050", in_chans=1, num_classes=10)
    network.conv_stem.stride = (1, 1)
    return Padded(network)


def vit() -> nn.Module:
    """A vision transformer of timm's parts: 4×4 patches, 4 blocks of width 64; 139,018 parameters."""
    from timm.models.vision_transformer import VisionTransformer  # here: a ResNet-20 needs torch alone

    return VisionTransformer(
        img_size=28, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2
    )


NETWORKS = {"resnet20": resnet20, "mobilenetv3": depthwise, "vit": vit}


def new(name: str) -> nn.Module:
    """Builds a network with fixed initial weights."""
    torch.manual_seed(0)
    return NETWORKS[name]()
