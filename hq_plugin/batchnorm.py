"""BatchNorm in eval mode is one affine map a channel: which layers are that, and turning them into it."""

from __future__ import annotations

import copy
import math
from collections import Counter
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
    return has_statistics(module) and module.weight is not None and module.bias is not None


def norms_to_fold(model: nn.Module) -> list[Any]:
    """Returns the BatchNorms of a model that `fold_batchnorm` folds.

    Not those whose tensors are another layer's as well, nor those of a class whose own forward would give something
    else: one that scales by `1 + weight`, or always takes the statistics of the batch.
    """
    uses = Counter(id(tensor) for module in model.modules() for tensor in _tensors(module))
    return [
        module
        for module in model.modules()
        if foldable(module) and all(uses[id(tensor)] == 1 for tensor in _tensors(module)) and _stays_itself(module)
    ]


def _tensors(module: nn.Module) -> list[Tensor]:
    own = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in own if tensor is not None]


#: BatchNorms whose forward is torch's own.
_KNOWN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@torch.no_grad()
def _stays_itself(module: Any) -> bool:
    """Whether a BatchNorm gives the same once it is folded: tried, where its class is not one of torch's."""
    if type(module) in _KNOWN:
        return True
    places = {nn.BatchNorm1d: 1, nn.BatchNorm3d: 3}
    dims = next((count for base, count in places.items() if isinstance(module, base)), 2)
    shape = (2, module.num_features, *[2] * dims)
    like = module.weight
    probe = torch.linspace(-2, 2, math.prod(shape), device=like.device).view(shape).to(like.dtype)
    norm = copy.deepcopy(module).eval()
    try:
        before = type(norm).forward(norm, probe)
        _fold(norm)
        after = type(norm).forward(norm, probe)
        loose = 1e-4 if like.dtype in (torch.float32, torch.float64) else 2e-2
        return bool(torch.allclose(before, after, rtol=loose, atol=loose))
    except Exception:  # it takes something else: then nothing is known of it
        return False


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
    for norm in norms_to_fold(model):
        _fold(norm)


def _fold(bn: Any) -> None:
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
