"""In which mode the modules of a network are while it trains, and what they keep from one forward to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def gradients() -> Iterator[None]:
    """Inside, gradients are computed, whatever the caller's own mode is: evaluation code likes `torch.no_grad`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def modes_kept(network: nn.Module) -> Iterator[None]:
    """Inside, modes may change; afterwards each of the network's modules is in the mode that it was in."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Inside, the network is in eval mode; afterwards each of its modules is in the mode that it was in."""
    with modes_kept(network):
        network.eval()
        yield


def set_training_modes(network: nn.Module, batch_statistics: bool) -> None:
    """Leaves the network in eval mode but for what must train otherwise.

    Dropout and stochastic depth stay off: the teacher has none, and the student is to match it.

    Args:
        network: The network.
        batch_statistics: Whether BatchNorm normalises by each batch's own statistics.
    """
    network.eval()
    for module in network.modules():
        if (batch_statistics and isinstance(module, _BatchNorm)) or _needs_training_mode(module):
            module.train()


def _needs_training_mode(module: nn.Module) -> bool:
    """cuDNN computes gradients of recurrent layers in training mode only."""
    return isinstance(module, nn.RNNBase) and any(p.is_cuda for p in module.parameters(recurse=False))


@contextmanager
def differentiable(network: nn.Module) -> Iterator[None]:
    """Inside, the network is in eval mode but for what has gradients in training mode only."""
    with modes_kept(network), without_recurrent_dropout(network):
        set_training_modes(network, batch_statistics=False)
        yield


@contextmanager
def without_recurrent_dropout(network: nn.Module) -> Iterator[None]:
    """Inside, recurrent layers drop nothing, in training mode either: no part of theirs could be left in eval."""
    layers = [module for module in network.modules() if isinstance(module, nn.RNNBase)]
    kept = [layer.dropout for layer in layers]
    for layer in layers:
        layer.dropout = 0.0
    try:
        yield
    finally:
        for layer, dropout in zip(layers, kept, strict=True):
            layer.dropout = dropout


class KeptValues:
    """What modules compute from their parameters in eval mode and keep, as timm's LeViT its attention biases.

    Such a module defines `train` itself, to forget what it kept when its parameters may change. Ours change in
    eval mode, so it is told by a change of mode and back; the modes of all modules stay as they were.

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module) -> None:
        self._keepers = [module for module in network.modules() if type(module).train is not nn.Module.train]

    def forget(self) -> None:
        """Makes every module compute anew in the next forward."""
        for keeper in self._keepers:
            with modes_kept(keeper):
                mode = keeper.training
                keeper.train(True)
                keeper.train(mode)
