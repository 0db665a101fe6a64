"""BatchNorm in eval mode is one affine map a channel: which layers are that, and turning them into it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_statistics(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm that keeps running statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def foldable(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm that is one learned affine map a channel in eval mode."""
    return has_statistics(module) and module.weight is not None


@torch.no_grad()
def affine_of(bn: Any) -> tuple[Tensor, Tensor]:
    """Returns the affine map that a BatchNorm is in eval mode: scale and shift, `[channels]`, in its dtype.

    They are asked from torch's own kernel, so that a layer that is folded into them gives the same bits: a
    difference of one unit in the last place can flip the rounding of an activation.
    """
    probe = torch.zeros(1, bn.num_features, 2, 2, dtype=bn.weight.dtype, device=bn.weight.device)
    zero = torch.zeros_like(bn.weight)
    shift = F.batch_norm(probe, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
    scale = F.batch_norm(probe + 1, zero, bn.running_var, bn.weight, zero, eps=bn.eps)
    return scale[0, :, 0, 0].clone(), shift[0, :, 0, 0].clone()


@torch.no_grad()
def fold_batchnorm(model: nn.Module) -> None:
    """Turns each BatchNorm into the affine map that it is in eval mode: statistics become 0 and 1.

    The layer keeps its class (timm's hold an activation as well), its scale and shift take over what the
    statistics did, and constants cost nothing on disk.
    """
    for module in model.modules():
        if foldable(module):
            bn: Any = module
            scale, shift = affine_of(bn)
            bn.weight.copy_(scale)
            bn.bias.copy_(shift)
            bn.running_mean.zero_()
            bn.running_var.fill_(_one_less(bn.eps, bn.running_var.dtype))
            if bn.num_batches_tracked is not None:
                bn.num_batches_tracked.zero_()


def _one_less(eps: float, dtype: torch.dtype) -> float:
    """Returns the number that, plus `eps`, is exactly 1 in a dtype."""
    value, one = torch.tensor(1 - eps, dtype=dtype), torch.tensor(1.0, dtype=dtype)
    for candidate in (value, torch.nextafter(value, one), torch.nextafter(value, torch.zeros_like(one))):
        if bool(candidate + eps == 1):
            return float(candidate)
    return float(value)
