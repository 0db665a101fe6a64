"""Packed Linear, Conv1d, Conv2d and Embedding, and packed subclasses of them.

A packed layer is a subclass of the float layer that it stands for: its forward is the float layer's own
(timm's Conv2dSame pads, ScaledStdConv2d standardises), reading `self.weight`, which here is a property
that dequantizes the packed integers. It takes and gives float tensors, and quantizes its own input.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Proxy
from torch.utils.weak import WeakIdKeyDictionary

from hq_plugin.errors import ModelError
from hq_plugin.packing import pack_bits, packed_bytes, unpack_bits
from hq_plugin.policy import FLOAT_BITS, LEFT_OUT, LayerBits
from hq_plugin.quantization import (
    dequantize_weight,
    fake_quantize_activation,
    fake_quantize_rows,
    input_levels,
    round_to_levels,
    weight_offset,
    weight_rows,
)
from hq_plugin.stored_qparams import ZERO_BITS, load_step, load_zero, step_bytes, store_step, store_zero

# In a graph that torch.fx traces they are nodes: whether they quantize must not be decided while it traces.
fx.wrap("fake_quantize_activation")
fx.wrap("fake_quantize_rows")

#: Buffers that hold a packed weight, shared where weights are tied, and those of a quantized input; a layer has
#: what its widths need.
WEIGHT_BUFFERS = ("weight_packed", "weight_step", "weight_zero")
INPUT_BUFFERS = ("activation_step", "activation_zero_point")
#: What no move of dtype changes. (Integers are never changed.)
_FIXED_DTYPES = {"activation_step": torch.float32}


def adopt(module: nn.Module, new_type: type[nn.Module]) -> Any:
    """Returns a module of another class with the attributes of `module`, which stays as it is.

    Tensors and submodules are shared; the containers that hold them are not. `__init__` does not run,
    so that any subclass, whatever its constructor takes, can be turned into another.
    """
    adopted = new_type.__new__(new_type)
    for name, value in vars(module).items():
        adopted.__dict__[name] = value.copy() if isinstance(value, dict) else value
    return adopted


def _class_of(module: nn.Module, given: type[nn.Module] | None) -> Any:
    return given or type(module)


class PackedModule(nn.Module):
    """Mixin of every packed layer.

    Attributes:
        bits: Widths of weight and input.
        weight_shape: Shape of the weight.
        weight_dtype: Dtype in which `weight` is given out; follows `model.half()` and its like.
        weight_packed: uint8, the integers (see `hq_plugin.packing`).
        weight_step: uint8 `[1 + rows]`, a row being a channel or a group (see `store_step`); empty if the weight is
            left out.
        weight_zero: uint8, zero points of `ZERO_BITS` packed like the integers, if the weight has groups.
        activation_step: float32 scalar, if the input is quantized with one step.
        activation_zero_point: int32 scalar, if the input is quantized with one step.
    """

    bits: LayerBits
    weight_shape: tuple[int, ...]
    weight_dtype: torch.dtype
    weight_packed: Tensor
    weight_step: Tensor
    weight_zero: Tensor
    activation_step: Tensor
    activation_zero_point: Tensor
    _float_type: type[nn.Module]
    _cache_enabled: bool
    _cached: Tensor | None
    _kernel: Any
    #: A weight that was read from outside and is not kept, with its sum: whoever has it may edit it (a merged
    #: adapter), which is seen when the layer runs next.
    _lent: tuple[Tensor, float] | None = None
    #: Whether the layer's own forward is what reads the weight.
    _running: bool = False
    #: Identity and version of the steps of the input, and the numbers that they are.
    _levels: tuple[list[tuple[int, int]], tuple[float, int, int]] | None = None

    @classmethod
    def skeleton(
        cls,
        float_module: nn.Module,
        bits: LayerBits,
        *,
        float_type: type[nn.Module] | None = None,
        drop: Sequence[str] = (),
    ) -> PackedModule:
        """Returns a packed layer with buffers of the right shapes, whose values are still to be filled in.

        Args:
            float_module: The layer whose settings and bias it takes over; it is not changed.
            bits: Its widths.
            float_type: The class to subclass; None takes that of `float_module`.
            drop: Names of submodules that are not taken over.
        """
        weight = float_module._parameters["weight"]
        assert weight is not None
        packed: PackedModule = adopt(float_module, packed_type(_class_of(float_module, float_type)))
        del packed._parameters["weight"]
        for name in drop:
            packed._modules.pop(name, None)
        packed.bits, packed.weight_shape = bits, tuple(weight.shape)
        packed.weight_dtype = weight.dtype
        packed._cache_enabled, packed._cached, packed._kernel = True, None, None
        device = weight.device
        length = packed_bytes(weight.numel(), bits.weight)
        packed.register_buffer("weight_packed", torch.empty(length, dtype=torch.uint8, device=device))
        rows = weight_rows(weight, bits.group_size).shape[0]
        length = 0 if bits.weight == LEFT_OUT else step_bytes(rows)
        packed.register_buffer("weight_step", torch.empty(length, dtype=torch.uint8, device=device))
        if bits.group_size:
            length = packed_bytes(rows, ZERO_BITS)
            packed.register_buffer("weight_zero", torch.empty(length, dtype=torch.uint8, device=device))
        if bits.static_input:
            packed.register_buffer("activation_step", torch.ones((), dtype=torch.float32, device=device))
            packed.register_buffer("activation_zero_point", torch.zeros((), dtype=torch.int32, device=device))
        return packed

    @classmethod
    def from_integers(
        cls,
        float_module: nn.Module,
        integers: Tensor,
        step: Tensor,
        bits: LayerBits,
        activation_step: Tensor | None = None,
        activation_zero_point: Tensor | None = None,
        *,
        zero: Tensor | None = None,
        float_type: type[nn.Module] | None = None,
        drop: Sequence[str] = (),
    ) -> PackedModule:
        """Returns a packed layer with given integers.

        Args:
            float_module: The layer whose settings and bias it takes over; it is not changed.
            integers: int8, the shape of its weight, inside `weight_range(bits.weight)`.
            step: `[rows]`; rounded as by `stored_step`.
            zero: `[rows]`, needed if the weight has groups; rounded to `zero_unit`.
            bits: Its widths.
            activation_step: Scalar, needed if the input is quantized with one step.
            activation_zero_point: Whole scalar, needed if the input is quantized with one step.
            float_type: The class to subclass; None takes that of `float_module`.
            drop: Names of submodules that are not taken over.

        Raises:
            ValueError: An integer lies outside its width, or a step or zero point is missing.
            PolicyError: The group size does not fit the weight.
        """
        packed = cls.skeleton(float_module, bits, float_type=float_type, drop=drop)
        packed.weight_packed = pack_bits(integers, bits.weight)
        if bits.weight != LEFT_OUT:
            packed.weight_step = store_step(step)
        if bits.group_size:
            if zero is None:
                raise ValueError("A weight with groups needs zero points.")
            packed.weight_zero = pack_bits(store_zero(zero.detach(), bits.weight), ZERO_BITS)
        if bits.static_input:
            if activation_step is None or activation_zero_point is None:
                raise ValueError("A layer with a quantized input needs activation_step and zero point.")
            packed.activation_step = activation_step.detach().float().reshape(())
            packed.activation_zero_point = activation_zero_point.detach().to(torch.int32).reshape(())
        return packed

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, in the shape and dtype of the float layer's."""
        if self._cached is not None:
            return self._cached
        if torch.compiler.is_compiling():
            return self._dequantized()
        if self._lent is not None and not self._running:
            return self._lent[0]
        # What is kept must serve training, too, whatever the mode of who reads it first.
        with torch.inference_mode(False), torch.no_grad():
            weight = self._dequantized()
        renormalised = getattr(self, "max_norm", None) is not None  # by its own forward, in place
        wanted = self._kernel is None or self._kernel.needs_weight
        if self._cache_enabled and wanted and not renormalised:
            self._cached = weight
        elif not self._running and type(weight) is Tensor and not weight.is_meta:  # none without values
            self._lent = weight, float(weight.sum(dtype=torch.float32))
        return weight

    def _dequantized(self) -> Tensor:
        if self.bits.weight == LEFT_OUT:  # one 0 stands for all
            nothing = torch.zeros((), dtype=self.weight_dtype, device=self.weight_step.device)
            return nothing.expand(self.weight_shape)
        integers = unpack_bits(self.weight_packed, self.bits.weight, self.weight_shape)
        rows = weight_rows(integers, self.bits.group_size)
        weight = dequantize_weight(rows, load_step(self.weight_step), self.bits.weight, self._zero_points())
        return weight.view(self.weight_shape).to(self.weight_dtype)

    def _take_back(self) -> None:
        """Keeps a weight that was edited since it was read from outside; lets go of any other."""
        if self._lent is not None:
            weight, total = self._lent
            self._cached, self._lent = (None if float(weight.sum(dtype=torch.float32)) == total else weight), None

    def _zero_points(self) -> Tensor | None:
        """Returns the zero points of the groups, float32 `[rows]`."""
        if not self.bits.group_size:
            return None
        rows = math.prod(self.weight_shape) // self.bits.group_size
        return load_zero(unpack_bits(self.weight_zero, ZERO_BITS, (rows,)), self.bits.weight)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the float layer's forward on the quantized input and the dequantized weight, or a kernel.

        Kernels have no gradient: where the input wants one (adapters train before this layer), the forward runs.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and self._lent is not None:
            self._take_back()
        plain = len(args) == 1 and not kwargs and not compiling
        # A kernel that needs no weight knows nothing of one that was edited.
        edited = self._cached is not None and self._kernel is not None and not self._kernel.needs_weight
        if self._kernel is not None and plain and not edited and not wants_gradient(args[0]):
            run = self._kernel.select(args[0])
            if run is not None:
                return run(args[0])
        args, kwargs = with_first(args, kwargs, self.quantize_input)
        if compiling or self._cached is not None:
            return super().forward(*args, **kwargs)
        self.__dict__["_running"] = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.__dict__["_running"] = False

    def set_kernel(self, kernel: Any) -> None:
        """Sets what computes the layer, a `Bound` or `ByRows` of `nn/kernels.py`; None is its own forward."""
        self._kernel, self._cached, self._lent = kernel, None, None

    def quantize_input(self, x: Any) -> Any:
        """Returns a layer's input as its own forward sees it: rounded, unless it is not to be quantized."""
        traced = isinstance(x, Proxy)
        if not traced and (not isinstance(x, Tensor) or not x.is_floating_point()):
            return x
        bits = self.bits.activation
        if bits == FLOAT_BITS:
            return x
        if self.bits.dynamic:
            return fake_quantize_rows(x, bits)
        if traced or torch.compiler.is_compiling() or wants_gradient(x):
            return fake_quantize_activation(x, self.activation_step, self.activation_zero_point, bits)
        return round_to_levels(x, *self.input_levels())

    def input_levels(self) -> tuple[float, int, int]:
        """Returns what the input is rounded to, as numbers: reading them from tensors takes as long as rounding."""
        step, zero_point = (self._buffers[name] for name in INPUT_BUFFERS)  # quicker than as attributes
        assert step is not None
        assert zero_point is not None
        now = versions(step, zero_point)
        if self._levels is None or self._levels[0] != now:
            self._levels = now, input_levels(step, zero_point, self.bits.activation)
        return self._levels[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Moves of device and dtype come through here. What is exact stays exact: steps keep their dtype.
        exact = {name: self._buffers[name] for name in _FIXED_DTYPES if name in self._buffers}
        shared = {name: self._buffers[name] for name in WEIGHT_BUFFERS if name in self._buffers}
        super()._apply(fn, recurse)
        for name, old in shared.items():
            self._buffers[name] = _moved(old, self._buffers[name], fn)
        for name, before in exact.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != _FIXED_DTYPES[name]:
                self._buffers[name] = before.to(after.device)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.weight_step.device)).dtype
        self._cached = self._lent = None
        if self._kernel is not None:
            self._kernel = self._kernel.again(self)
            self._lent = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.set_kernel(None)
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_cached": None,
            "_lent": None,
            "_running": False,
            "_kernel": None,
            "_levels": None,
        }

    def __reduce_ex__(self, protocol: Any) -> Any:
        # No module has these classes by a name, by which pickle (spawned processes, copies) would look for them.
        return _empty, (self._float_type,), self.__getstate__()

    def extra_repr(self) -> str:
        """Shows the float layer's settings and the widths."""
        return f"{super().extra_repr()}, bits={self.bits}"


def with_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a layer's call with its input changed: the first one, by place or by name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    if not kwargs:
        return args, kwargs
    name, value = next(iter(kwargs.items()))
    return args, {**kwargs, name: change(value)}


def wants_gradient(x: Any) -> bool:
    """Whether what is computed from an input is to be differentiated in it."""
    return isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()


def versions(*tensors: Tensor) -> list[tuple[int, int]]:
    """Returns what changes when tensors are replaced, or their values are."""
    return [(id(t), 0 if t.is_inference() else t._version) for t in tensors]


@cache
def packed_type(float_type: Any) -> type[Any]:
    """Returns the packed subclass of a float layer's class."""
    if issubclass(float_type, PackedModule):
        return float_type
    name = f"Packed{float_type.__name__}"
    return type(name, (PackedModule, float_type), {"_float_type": float_type, "__module__": __name__})


def _empty(float_type: Any) -> PackedModule:
    made: Any = packed_type(float_type)
    empty: PackedModule = made.__new__(made)
    return empty


PackedLinear = packed_type(nn.Linear)
PackedConv1d = packed_type(nn.Conv1d)
PackedConv2d = packed_type(nn.Conv2d)
PackedEmbedding = packed_type(nn.Embedding)


def affine_weight(layer: PackedModule) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what a packed weight is made of, for other runtimes: `(integer + offset) * step`.

    Returns:
        Integers, int8 `[rows, inputs]`; steps and offsets, float32 `[rows, groups]`, one group for a whole
        channel. Offsets of whole channels are 0: at 1 and 2 bits, integers are odd and steps halved instead.
    """
    integers = unpack_bits(layer.weight_packed, layer.bits.weight, layer.weight_shape).flatten(1)
    rows, offset = integers.shape[0], weight_offset(layer.bits.weight)
    if layer.bits.weight == LEFT_OUT:
        return integers, torch.ones(rows, 1, device=integers.device), torch.zeros(rows, 1, device=integers.device)
    step = load_step(layer.weight_step).view(rows, -1)
    zero = layer._zero_points()
    if zero is not None:
        return integers, step, offset - zero.view(rows, -1)
    if offset:
        return integers * 2 + 1, step / 2, torch.zeros_like(step)
    return integers, step, torch.zeros_like(step)


def is_plain(layer: PackedModule, base: type[nn.Module]) -> bool:
    """Whether a packed layer computes what `base` does: a subclass with a forward of its own may do more."""
    return isinstance(layer, base) and layer._float_type.forward is base.forward


def share_packed_weight(owner: PackedModule, other: PackedModule) -> None:
    """Ties `other`'s packed weight to `owner`'s: both hold the same tensors."""
    for name in WEIGHT_BUFFERS:
        if name in owner._buffers:
            other._buffers[name] = owner._buffers[name]
    other._cached = other._lent = None


#: Buffers that were moved, with what moved them and what they became, as long as all three live.
_MOVED = WeakIdKeyDictionary()


def _moved(old: Any, new: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """Returns what a buffer became by a move: of layers that share it, what it became in the first."""
    known = _MOVED.get(old)
    if known is not None and known[0]() is move and (before := known[1]()) is not None:
        return before
    _MOVED[old] = weakref.ref(move), weakref.ref(new)
    return new


def weight_key(layer: PackedModule) -> int:
    """Returns what layers that share a packed weight have in common, and no others."""
    packed = layer.weight_packed
    return packed.data_ptr() if packed.numel() else id(layer)  # nothing lies nowhere


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    """Returns the packed layers of a model by name.

    Args:
        model: What `quantize` or `load` returned; any other model has none.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


def check_unedited(model: nn.Module) -> None:
    """Checks, before a model is saved, that its dequantized weights are still those that its integers give.

    Raises:
        ModelError: They were edited in place. Merging a LoRA adapter does that, and it would be lost.
    """
    for name, module in packed_modules(model).items():
        module._take_back()
        if module._cached is not None:
            with torch.no_grad():
                edited = not torch.equal(module._cached, module._dequantized())
            if edited:
                raise ModelError(
                    f"The dequantized weight of {name!r} was edited (by merging an adapter?): the packed integers "
                    "do not hold that. Save the adapter beside the packed model, or merge it into the float model "
                    "and quantize that."
                )


def cache_weights(model: nn.Module, enabled: bool) -> nn.Module:
    """Switches the cache of dequantized weights, for speed or for memory.

    On (the default), each layer dequantizes its weight once, on first use, and keeps it: a forward is as
    fast as the float model's, and memory holds the float weights beside the packed ones. Off, only the
    packed integers stay in memory, and each forward dequantizes layer by layer.

    Args:
        model: A converted model; it is changed in place.
        enabled: Whether to cache.

    Returns:
        `model`.
    """
    for module in packed_modules(model).values():
        module._cache_enabled, module._cached, module._lent = enabled, None, None
        if not enabled and module._kernel is not None and module._kernel.holds_weight:
            module.set_kernel(None)
    return model
