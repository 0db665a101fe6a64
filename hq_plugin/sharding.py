"""Models that no device holds whole: their parameters are shared out over the processes (FSDP2).

accelerate decides whether, and how (`accelerate config`, `fsdp_version: 2`); without it, nothing here does
anything. What is sharded is a shell: the same modules with parameters of their own, which are the model's in
pieces. The model itself stays whole where it is, in the host's memory, and takes over what the shell has learned. A
layer's generated weight exists only while the FSDP unit that holds the layer runs.
"""

from __future__ import annotations

import copy
import gc
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hq_plugin.distribution import in_pieces
from hq_plugin.errors import ModelError
from hq_plugin.qat_layers import qat_layers

#: Modules without a forward of their own, whose parts are called one by one.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def sharded() -> bool:
    """Whether accelerate is configured to shard parameters."""
    return bool(Accelerator().is_fsdp2)


@contextmanager
def placed(model: nn.Module, *, keep: bool = False, device: torch.device | None = None) -> Iterator[nn.Module]:
    """Inside, a model is where it can run: as it is, or as a shell whose parameters are sharded.

    Every process must enter, and run the shell as often as the others do: each forward gathers parameters from all.

    Args:
        model: The model.
        keep: Whether the model takes over the shell's parameters and buffers once the block ends without an error.
        device: Where a model that is not sharded is moved to; None leaves it.

    Raises:
        ModelError: The model cannot be sharded.
    """
    if not sharded():
        yield model if device is None else model.to(device)
        return
    shell = runnable(model)
    yield shell
    if keep:
        _take_over(model, shell)
    del shell
    gc.collect()  # FSDP's states refer to each other


def runnable(model: nn.Module) -> nn.Module:
    """Returns what runs in place of a model: itself, or a new shell.

    Raises:
        ModelError: The model cannot be sharded.
    """
    if not sharded():
        return model
    from torch.distributed.fsdp import fully_shard  # a second, which only this way to run needs

    # What is shared stays shared. Buffers are copied: what runs in the shell must not write into the model.
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    shell = copy.deepcopy(model, memo)
    plugin = copy.copy(Accelerator().state.fsdp_plugin)  # which would keep the classes of this model for the next
    # All in the parameters' own precision: a quantization step is learned as a logarithm, of which half precision
    # leaves too little. Mixed precision is autocast's, as without FSDP.
    try:
        plugin.set_auto_wrap_policy(shell)
        for unit in _units(shell, plugin.auto_wrap_policy):
            fully_shard(unit, reshard_after_forward=plugin.reshard_after_forward, offload_policy=plugin.cpu_offload)
        fully_shard(shell, offload_policy=plugin.cpu_offload)
    except (ValueError, TypeError, AssertionError, NotImplementedError, RuntimeError) as error:
        raise ModelError(f"{type(model).__name__} cannot be sharded by FSDP: {error}") from error
    return shell


def _units(model: nn.Module, policy: Any) -> list[nn.Module]:
    """Returns the modules whose parameters are gathered together, inner ones first.

    A layer alone is none: its neighbours may read its weight, and what generates the weight belongs to it.

    Args:
        model: The shell.
        policy: accelerate's, for this model: by classes, or by the number of parameters.
    """
    options = getattr(policy, "keywords", {})
    classes, least = tuple(options.get("transformer_layer_cls", ())), options.get("min_num_params", math.inf)
    layers = qat_layers(model).values()
    inside = {id(part) for layer in layers for part in layer.modules()}
    everywhere = _uses(model)

    def is_unit(module: nn.Module) -> bool:
        if module is model or isinstance(module, _CONTAINERS) or id(module) in inside or not any(module.children()):
            return False
        if isinstance(module, classes):
            return True
        # What is shared with the rest of the network belongs to the network.
        alone = all(everywhere[key] == count for key, count in _uses(module).items())
        return sum(p.numel() for p in module.parameters()) > least and alone

    return [module for module in reversed(list(model.modules())) if is_unit(module)]


def _uses(module: nn.Module) -> Counter[int]:
    """Counts how often each parameter is used by the modules inside one."""
    return Counter(id(p) for part in module.modules() for p in part._parameters.values() if p is not None)


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor that may be in pieces as one; every process must call it."""
    complete: Tensor = tensor.full_tensor() if in_pieces(tensor) else tensor  # type: ignore[attr-defined]
    return complete


def in_pieces_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns a whole tensor, which every process has, in pieces as another one is; as it is if that is whole."""
    if not in_pieces(like):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def _take_over(model: nn.Module, shell: nn.Module) -> None:
    parameters, buffers = dict(shell.named_parameters()), dict(shell.named_buffers())
    for name, parameter in model.named_parameters():
        parameter.copy_(whole(parameters[name].detach()))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
