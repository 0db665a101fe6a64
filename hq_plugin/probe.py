"""What one forward does with a model's weights: which layers are called, and which weights are read around them.

A layer's own call is seen by a hook. A weight that goes into a matrix product without one (`F.linear(x,
self.qkv.weight)`, a mixture of experts' 3-D parameter) is seen where torch is called with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hq_plugin.modes import in_eval_mode

#: Functions that multiply by a weight, and the position of the first argument that may be one.
_PRODUCTS = {
    "linear": 1,
    "matmul": 0,
    "__matmul__": 0,
    "__rmatmul__": 0,
    "mm": 0,
    "bmm": 0,
    "addmm": 1,
    "baddbmm": 1,
    "einsum": 0,
    "grouped_mm": 0,
    "_grouped_mm": 0,
    "conv1d": 1,
    "conv2d": 1,
    "embedding": 1,
    "multi_head_attention_forward": 5,
    "_native_multi_head_attention": 5,
    "_transformer_encoder_layer_fwd": 3,
}
#: Functions whose result is the weight still, in another memory; views share its memory and need no list.
_COPIES = ("__getitem__", "index_select", "contiguous", "reshape", "clone", "to", "type_as", "squeeze", "unflatten")


@dataclass
class Probe:
    """What was seen.

    Attributes:
        calls: Multiply-accumulates and input elements of the batch, of each watched layer that was called.
        reads: Multiply-accumulates of the batch, of each watched tensor that went into a product, in a
            layer's call or elsewhere, by `id`.
    """

    calls: dict[str, tuple[int, int]] = field(default_factory=dict)
    reads: dict[int, int] = field(default_factory=dict)


def probe(
    model: nn.Module,
    layers: Mapping[str, tuple[str, nn.Module]],
    weights: Mapping[int, Tensor],
    run: Callable[[nn.Module], Any],
) -> Probe:
    """Runs a model once in eval mode, without gradients; it is left as it was.

    Args:
        model: The model.
        layers: Layers to watch: name to kind and module.
        weights: Tensors to watch, by `id`.
        run: Runs the model on one batch.
    """
    seen = Probe()
    handles = []
    try:
        for name, (kind, module) in layers.items():
            handles.append(module.register_forward_hook(_record(seen, name, kind), with_kwargs=True))
        with in_eval_mode(model), torch.no_grad(), _Watch(seen, weights):
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _record(seen: Probe, name: str, kind: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        value = args[0] if args else next(iter(kwargs.values()), None)
        macs, numel = seen.calls.get(name, (0, 0))
        if not isinstance(value, Tensor):  # a HeldWeight, which multiplies nothing itself, or positions by a shape
            seen.calls[name] = macs, numel
        else:
            seen.calls[name] = macs + _macs(module, kind, value, output), numel + value.numel()

    return hook


def _macs(module: nn.Module, kind: str, value: Tensor, output: Any) -> int:
    if kind == "embedding":
        return 0
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not isinstance(output, Tensor):  # a linear layer that does more: every input vector meets every row
        return value.numel() // max(value.shape[-1], 1) * weight.numel()
    # Every output element is a dot product over weight[0]: in_features, or in_channels/groups * kernel.
    return output.numel() * math.prod(weight.shape[1:])


class _Watch(TorchFunctionMode):
    """Follows watched tensors into products."""

    def __init__(self, seen: Probe, weights: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.seen = seen
        self.memory = {weight.untyped_storage().data_ptr(): key for key, weight in weights.items()}
        self.memory.pop(0, None)  # tensors without memory (meta) cannot be told apart
        #: Copies of weights by id, kept alive so that ids stay theirs.
        self.copies: dict[int, tuple[Tensor, int]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS:
            tensors = list(_tensors((*args[_PRODUCTS[name] :], *kwargs.values())))
            for tensor in tensors:
                key = self._key(tensor)
                if key is not None:
                    macs = _product_macs(name, args, kwargs, tensor, output)
                    self.seen.reads[key] = self.seen.reads.get(key, 0) + macs
        elif name in _COPIES and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            key = self._key(args[0])
            if key is not None and output.dim() > 1:
                self.copies[id(output)] = output, key
        return output

    def _key(self, tensor: Tensor) -> int | None:
        if not tensor.is_floating_point() or tensor.dim() < 2:
            return None
        if id(tensor) in self.copies:
            return self.copies[id(tensor)][1]
        return self.memory.get(tensor.untyped_storage().data_ptr())


def _tensors(values: Any) -> Any:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _product_macs(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, output: Any) -> int:
    """Returns the multiply-accumulates of a product by a weight."""
    if name == "embedding":
        return 0
    if name in ("conv1d", "conv2d"):
        return int(output.numel()) * math.prod(weight.shape[1:])
    first = next((tensor for tensor in _tensors((*args, *kwargs.values()))), weight)
    if name in ("linear", "matmul", "__matmul__", "mm", "bmm", "grouped_mm", "_grouped_mm"):
        return int(output.numel()) * first.shape[-1]
    # Others multiply every position of their input by the whole weight.
    return first.numel() // first.shape[-1] * weight.numel()


def first_inputs(
    layers: Mapping[str, nn.Module], run: Callable[[], Any], *, keywords: bool = False
) -> dict[str, Tensor]:
    """Returns the first argument of the first call of each layer in one forward, where it is a tensor.

    Args:
        layers: Layers by name; those that are not called are left out.
        run: Runs the model that they are part of.
        keywords: Whether the first keyword counts where a layer is called with keywords alone.
    """
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args or tuple(kwargs.values() if keywords else ())
            if given and isinstance(given[0], Tensor):
                seen.setdefault(name, given[0].detach())

        return see

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen
