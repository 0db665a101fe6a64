"""Packed layers in the form in which they are exported: integers, and the runtime's operators on them.

A plain Linear with a float input becomes `MatMulNBits`, one with a quantized input a product of dequantized
integers, which the runtime fuses into an integer one, as it does for convolutions. Every other layer keeps its
own forward and reads a weight that is dequantized in the graph.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx import ops

from hq_plugin.integrations.onnxruntime.dynamic import OPSET, DynamicLinear
from hq_plugin.integrations.onnxruntime.readable import Readable
from hq_plugin.nn import PackedModule, adopt, affine_weight, is_plain, with_first
from hq_plugin.policy import FLOAT_BITS, LEFT_OUT
from hq_plugin.quantization import quantize_rows

#: Widths of `MatMulNBits`.
NBITS = (2, 4, 8)
#: Blocks of `MatMulNBits`.
_BLOCKS = (256, 128, 64, 32, 16)


def exported_layer(layer: PackedModule, accuracy_level: int) -> nn.Module:
    """Returns a layer in the form in which it is exported.

    Args:
        layer: The packed layer; it is not changed.
        accuracy_level: Of `MatMulNBits`: 4 lets it compute in 8-bit integers, 1 in float32.
    """
    made, float_form = _integer_form(layer, accuracy_level), _dequantizing(layer)
    if made is None:
        return float_form
    made.float_form = float_form
    # What code around the layer may read of it: `in_features`, `num_embeddings`, attributes of its user's.
    plain = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    made.__dict__.update({name: value for name, value in plain.items() if not hasattr(made, name)})
    return made


def _integer_form(layer: PackedModule, accuracy_level: int) -> Readable | None:
    """Returns a layer as operators on integers; None where it keeps its own forward."""
    in_blocks = layer.bits.group_size % min(_BLOCKS) == 0  # whole channels, which are padded, too
    if is_plain(layer, nn.Linear) and layer.bits.activation == FLOAT_BITS and in_blocks:
        return NBitsLinear(layer, accuracy_level)
    if is_plain(layer, nn.Linear) and not layer.bits.group_size:
        return _dynamic(layer) if layer.bits.dynamic else IntegerLinear(layer)
    if is_plain(layer, nn.Embedding) and layer.max_norm is None:
        return LeftOutEmbedding(layer) if layer.bits.weight == LEFT_OUT else IntegerEmbedding(layer)
    return None


def form(module: nn.Module) -> tuple[str, int]:
    """Returns the operator that an exported layer became, and the width of its integers in the file."""
    if isinstance(module, Readable):
        module = module.written_form()
    if isinstance(module, NBitsLinear):
        return "MatMulNBits", module.width
    if isinstance(module, LeftOutEmbedding):
        return "ConstantOfShape", LEFT_OUT
    if isinstance(module, IntegerEmbedding):
        return "Gather, DequantizeLinear", module.width
    operator = "MatMulInteger" if isinstance(module, DynamicLinear) else "DequantizeLinear"
    integers = next(name for name in dict(module.named_buffers(recurse=False)) if name.startswith("weight_int"))
    return operator, int(integers.removeprefix("weight_int"))


class NBitsLinear(Readable):
    """A Linear with integer weights and a float input.

    Attributes:
        width: Bits of an integer: 2, 4 or 8.
        packed: uint8 `[outputs, blocks, block * width / 8]`, the first integer in the lowest bits.
        scales: float32 `[outputs * blocks]`.
        zeros: uint8, packed like the integers, rows padded to bytes.
        correction: float32 `[blocks, outputs]`, where zero points are not whole: what is left of them, times the
            step.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    correction: Tensor | None

    def __init__(self, layer: PackedModule, accuracy_level: int) -> None:
        super().__init__()
        integers, step, offset = affine_weight(layer)
        rows, inputs = integers.shape
        groups = step.shape[1]
        own = inputs // groups
        # A block of the runtime lies inside a group; a channel without such a divisor is padded.
        self.block = next((size for size in _BLOCKS if own % size == 0), 32)
        if groups > 1 and own % self.block:
            raise ValueError(f"Groups of {own} inputs have no block of {_BLOCKS}.")
        blocks = -(-inputs // self.block)
        per_group = max(blocks // groups, 1)
        step, offset = (part.repeat_interleave(per_group, dim=1) for part in (step, offset))
        low, high = int(integers.min()), int(integers.max())
        # value = (integer + offset) * step = (unsigned - zero) * step
        self.width = next(bits for bits in NBITS if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1))
        middle = 2 ** (self.width - 1)
        zero = middle - offset
        whole = zero.round().clamp(0, 2**self.width - 1)
        rest = (zero - whole) * step
        unsigned = (integers.int() + middle).to(torch.uint8)
        padded = nn.functional.pad(unsigned, (0, blocks * self.block - inputs), value=middle)
        self.inputs, self.rows, self.accuracy_level = inputs, rows, accuracy_level
        self.register_buffer("packed", _pack(padded, self.width).view(rows, blocks, -1))
        self.register_buffer("scales", step.contiguous().view(-1))
        self.register_buffer("zeros", _pack(whole.to(torch.uint8), self.width).view(-1))
        self.register_buffer("correction", rest.T.contiguous() if bool(rest.any()) else None)
        self.bias = _bias(layer)

    def forward(self, input: Tensor) -> Tensor:
        """Multiplies by the weight; only inside an export."""
        self.note_run()
        x = input  # which some call by its name
        attributes: dict[str, Any] = {
            "K": self.inputs,
            "N": self.rows,
            "bits": self.width,
            "block_size": self.block,
            "accuracy_level": self.accuracy_level,
        }
        shape = (*x.shape[:-1], self.rows)
        tensors = (x, self.packed, self.scales, self.zeros)
        y: Tensor = ops.symbolic(
            "com.microsoft::MatMulNBits", tensors, attributes, dtype=x.dtype, shape=shape, version=1
        )
        if self.correction is not None:
            sums = x.unflatten(-1, (-1, self.block)).sum(-1)
            y = y - sums @ self.correction
        return y if self.bias is None else y + self.bias


class IntegerLinear(Readable):
    """A Linear whose input is quantized: the product of two dequantized tensors, which the runtime fuses."""

    scale: Tensor
    zero: Tensor

    def __init__(self, layer: PackedModule) -> None:
        super().__init__()
        integers, step, _ = dequantizer(layer, transposed=True)
        self._name = f"weight_int{_storage_width(integers)}"
        self.register_buffer(self._name, integers)
        self.register_buffer("scale", step)
        self.register_buffer("zero", torch.zeros_like(step, dtype=torch.int8))
        self.input = InputQuantizer(layer)
        self.bias = _bias(layer)

    def forward(self, input: Tensor) -> Tensor:
        """Multiplies by the weight; only inside an export."""
        self.note_run()
        weight = _dequantized(getattr(self, self._name), self.scale, self.zero, axis=1)
        y = self.input(input) @ weight
        return y if self.bias is None else y + self.bias


def _dynamic(layer: PackedModule) -> DynamicLinear:
    integers, step, _ = dequantizer(layer, transposed=True)
    return DynamicLinear(layer, integers, step, _bias(layer), _storage_width(integers))


class IntegerEmbedding(Readable):
    """An Embedding that gathers integers and then scales them."""

    scale: Tensor
    offset: Tensor | None

    def __init__(self, layer: PackedModule) -> None:
        super().__init__()
        integers, step, offset = affine_weight(layer)
        self.width = _storage_width(integers)
        self._name = f"weight_int{self.width}"
        self.register_buffer(self._name, integers)
        self.register_buffer("scale", step)
        self.register_buffer("offset", offset if bool(offset.any()) else None)
        self._dtype = layer.weight_dtype
        self.embedding_dim = integers.shape[1]

    def forward(self, input: Tensor) -> Tensor:
        """Looks rows up."""
        self.note_run()
        ids = input  # which some call by its name
        integers = nn.functional.embedding(ids, getattr(self, self._name)).to(self._dtype)
        step = nn.functional.embedding(ids, self.scale)
        values = integers.unflatten(-1, (step.shape[-1], -1))
        if self.offset is not None:
            values = values + nn.functional.embedding(ids, self.offset).unsqueeze(-1)
        return (values * step.unsqueeze(-1)).flatten(-2)


class LeftOutEmbedding(Readable):
    """An Embedding whose values are all 0."""

    def __init__(self, layer: PackedModule) -> None:
        super().__init__()
        self.embedding_dim, self.weight_dtype = layer.weight_shape[1], layer.weight_dtype

    def forward(self, input: Tensor) -> Tensor:
        """Returns a row of zeros for each id."""
        self.note_run()
        return torch.zeros(*input.shape, self.embedding_dim, dtype=self.weight_dtype, device=input.device)


class InputQuantizer(nn.Module):
    """Quantizes and dequantizes a layer's input; nothing where the input stays float."""

    step: Tensor
    zero: Tensor

    def __init__(self, layer: PackedModule) -> None:
        super().__init__()
        self.bits, self.dynamic = layer.bits.activation, layer.bits.dynamic
        if layer.bits.static_input:
            self.register_buffer("step", layer.activation_step.detach().float().clone())
            self.register_buffer("zero", layer.activation_zero_point.to(torch.uint8))
            step, zero = float(layer.activation_step), int(layer.activation_zero_point)
            self.low, self.high = -zero * step, (2**self.bits - 1 - zero) * step

    def forward(self, x: Tensor) -> Tensor:
        """Returns the quantized input as floats."""
        if self.bits == FLOAT_BITS:
            return x
        if self.dynamic:
            integers, step, zero = quantize_rows(x, self.bits)
            return (integers - zero) * step
        if self.bits < 8:  # the runtime's integers are wider
            x = x.clamp(self.low, self.high)
        quantized = ops.symbolic(
            "QuantizeLinear", (x, self.step, self.zero), dtype=torch.uint8, shape=x.shape, version=OPSET
        )
        return _dequantized(quantized, self.step, self.zero)


class _Dequantizing(nn.Module):
    """Mixin of a layer that keeps its own forward, on a weight that is dequantized in the graph."""

    @property
    def weight(self) -> Tensor:
        """The weight, dequantized in the graph."""
        made: Any = self
        weight = _dequantized(getattr(made, made._name), made.weight_scale, made.weight_zero, axis=0)
        if made.weight_rest is not None:
            weight = weight + made.weight_rest
        return weight.view(made.weight_shape)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the float layer's forward on the quantized input."""
        made: Any = self
        args, kwargs = with_first(args, kwargs, made.input_quantizer)
        return super().forward(*args, **kwargs)


def _dequantizing(layer: PackedModule) -> nn.Module:
    float_type: Any = layer._float_type
    made: Any = adopt(layer, _dequantizing_type(float_type))
    made._buffers = {
        name: buffer for name, buffer in layer._buffers.items() if not name.startswith(("weight_", "activation_"))
    }
    integers, step, rest = dequantizer(layer)
    made._name = f"weight_int{_storage_width(integers)}"
    made.register_buffer(made._name, integers)
    # The float layer's own attributes stay beside these (NFNet's convolutions have a `scale`).
    made.register_buffer("weight_scale", step)
    made.register_buffer("weight_zero", torch.zeros_like(step, dtype=torch.int8))
    made.register_buffer("weight_rest", rest)
    made.input_quantizer = InputQuantizer(layer)
    result: nn.Module = made
    return result


@cache
def _dequantizing_type(float_type: Any) -> type[nn.Module]:
    name = f"Exported{float_type.__name__}"
    return type(name, (_Dequantizing, float_type), {"__module__": __name__})


def dequantizer(layer: PackedModule, transposed: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns a weight as `integers * step + rest`, with one step a channel.

    Args:
        layer: The packed layer.
        transposed: Whether channels are axis 1 of the result.

    Returns:
        int8 in the weight's shape, float32 `[channels]`, and what is to be added, or None. A weight with groups
        has a row of its own for each: `[rows * groups, group size]`.
    """
    integers, step, offset = affine_weight(layer)
    if step.shape[1] == 1:
        integers = integers if transposed else integers.view(layer.weight_shape)
        rest = offset * step if bool(offset.any()) else None
    else:
        if transposed:
            raise ValueError("A weight with groups has no channels to transpose.")
        integers, rest = integers.reshape(step.numel(), -1), (offset * step).reshape(-1, 1)
    integers = integers.T.contiguous() if transposed else integers.contiguous()
    return integers, step.reshape(-1).contiguous(), rest


def _dequantized(integers: Tensor, step: Tensor, zero: Tensor, axis: int | None = None) -> Tensor:
    made: Tensor = ops.symbolic(
        "DequantizeLinear",
        (integers, step, zero),
        {} if axis is None else {"axis": axis},
        dtype=torch.float32,
        shape=integers.shape,
        version=OPSET,
    )
    return made


def _storage_width(integers: Tensor) -> int:
    """Returns the narrowest width of an ONNX integer that holds a weight's."""
    low, high = int(integers.min()), int(integers.max())
    return 4 if low >= -8 and high < 8 else 8


def _pack(values: Tensor, width: int) -> Tensor:
    """Packs uint8 `[rows, n]` into bytes, the first value in the lowest bits, rows padded to whole bytes."""
    per_byte = 8 // width
    padded = nn.functional.pad(values, (0, -values.shape[1] % per_byte))
    parts = padded.unflatten(1, (-1, per_byte)).int()
    shifts = torch.arange(per_byte, dtype=torch.int32) * width
    return (parts << shifts).sum(-1).to(torch.uint8)


def _bias(layer: PackedModule) -> nn.Parameter | None:
    return layer._parameters.get("bias")
