"""The kernels that packed layers can run on: what torch ships, prepared from a layer's integers.

A packed layer's own forward dequantizes its weight and computes in floating point: exact, and as fast as the
float model. A kernel here computes the same from the integers. None is taken on trust, and which one a layer
runs on is `hq_plugin.kernels`'s choice. torchao's wheels bring no kernels of their own for CPUs; on GPUs they
call the same operators of torch.

=============== ========= ======================================== ===================== ==========================
kernel          devices   layers                                   computes in           result
=============== ========= ======================================== ===================== ==========================
`dequantized`   all       all                                      dtype of the input    the reference
`bfloat16`      all       Linear, float input                      bfloat16              rounded to bfloat16
`int4`          CPU, CUDA Linear, float input, weights up to 4 bit bfloat16              rounded to bfloat16
`int8_weight`   CPU, CUDA Linear, float input, whole channels      bfloat16              rounded to bfloat16
`int8`          CPU       Linear and Conv2d, static input steps,   8-bit integers        equal up to float rounding
                          whole channels; where x86 lacks VNNI,
                          not 8-bit weights and inputs together
`int8_matmul`   CPU, CUDA Linear, quantized input, whole channels  8-bit integers        equal up to float rounding
=============== ========= ======================================== ===================== ==========================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_plugin.nn.integer_inputs import input_quantizer
from hq_plugin.nn.packed import PackedModule, affine_weight, is_plain
from hq_plugin.nn.saturation import PLAIN_OUTPUT, may_clip, saturates
from hq_plugin.policy import FLOAT_BITS
from hq_plugin.quantization import quantize_rows

#: The kernel that every layer has: its own forward.
REFERENCE = "dequantized"

Run = Callable[[Tensor], Tensor]
#: Scale and shift of each channel of a result, float32 `[channels]`.
Affine = tuple[Tensor, Tensor]


class Kernel(ABC):
    """A way to compute a packed layer.

    Attributes:
        name: Its name in the registry.
        tolerance: Largest error that passes its check, relative to the norm of the reference's result.
    """

    name: str
    tolerance: float
    #: Whether a float weight is kept, which `cache_weights(model, False)` gives up.
    holds_weight = False

    @abstractmethod
    def refuses(self, layer: PackedModule) -> str | None:
        """Returns why the kernel cannot compute a layer, or None if it can."""

    @abstractmethod
    def bind(self, layer: PackedModule) -> Run:
        """Prepares a layer's weight; returns what computes the layer from its input."""


class FoldingKernel(Kernel):
    """A kernel that can scale and shift the channels of its result at no cost (see `hq_plugin.nn.folded`)."""

    @abstractmethod
    def bind(self, layer: PackedModule, norm: Affine | None = None) -> Run:
        """Prepares a layer's weight, and what is done to its result; returns what computes both."""


class Bound:
    """A kernel bound to a layer."""

    #: Whether the layer's dequantized weight is still read.
    needs_weight = False

    def __init__(self, kernel: Kernel, layer: PackedModule) -> None:
        self.kernel = kernel
        self.run = kernel.bind(layer)

    @property
    def holds_weight(self) -> bool:
        """Whether a float weight is kept."""
        return self.kernel.holds_weight

    def select(self, x: Tensor) -> Run | None:
        """Returns what computes the layer from an input; None is the layer's own forward."""
        return self.run

    def again(self, layer: PackedModule) -> Bound | None:
        """Returns the kernel bound to the layer as it is now (moved, or in another dtype), if it still can be."""
        return None if self.kernel.refuses(layer) else Bound(self.kernel, layer)


class ByRows:
    """Two ways to compute a linear layer, by the rows (samples, tokens) of its input.

    A language model reads a prompt at once and then writes token by token, and what is fastest for one is not
    for the other.

    Args:
        few: For inputs of up to `limit` rows; None is the layer's own forward.
        many: For all others.
        limit: Rows.
    """

    def __init__(self, few: Bound | None, many: Bound | None, limit: int) -> None:
        self.few, self.many, self.limit = few, many, limit
        self.needs_weight = few is None or many is None
        self.holds_weight = any(bound is not None and bound.holds_weight for bound in (few, many))

    def of(self, rows: int) -> Bound | None:
        """Returns the kernel for so many rows; None is the layer's own forward."""
        return self.few if rows <= self.limit else self.many

    def select(self, x: Tensor) -> Run | None:
        """Returns what computes the layer from an input; None is the layer's own forward."""
        bound = self.of(x.numel() // max(x.shape[-1], 1))
        return None if bound is None else bound.run

    def again(self, layer: PackedModule) -> ByRows:
        """Returns the kernels bound to the layer as it is now, where they still can be."""
        few, many = (None if bound is None else bound.again(layer) for bound in (self.few, self.many))
        return ByRows(few, many, self.limit)


def _unlike(layer: PackedModule, quantized: bool, *devices: str) -> str | None:
    """Returns why a layer is no plain Linear with a quantized, or a float, input on one of some devices."""
    if not is_plain(layer, nn.Linear):
        return "it is not a plain Linear layer"
    if (layer.bits.activation != FLOAT_BITS) != quantized:
        return f"its input is {'not ' if quantized else ''}quantized"
    device = layer.weight_packed.device.type
    return f"it is not for {device}" if devices and device not in devices else None


class _BFloat16(Kernel):
    name, tolerance, holds_weight = "bfloat16", 1e-2, True

    def refuses(self, layer: PackedModule) -> str | None:
        if (reason := _unlike(layer, False)) is not None:
            return reason
        return None if layer._cache_enabled else "it keeps a float weight, and the model is not to"

    def bind(self, layer: PackedModule) -> Run:
        weight, bias = layer.weight.detach().bfloat16(), _bias(layer)

        def run(x: Tensor) -> Tensor:
            return _biased(F.linear(x.bfloat16(), weight).to(x.dtype), bias)

        return run


class _Int4(Kernel):
    """torch's 4-bit weights in groups with float zero points; narrower widths are widened to 4 bits."""

    name, tolerance = "int4", 2e-2

    def refuses(self, layer: PackedModule) -> str | None:
        if (reason := _unlike(layer, False, "cpu", "cuda")) is not None:
            return reason
        if layer.bits.weight > 4:
            return "its weights have more than 4 bits"
        rows, inputs = layer.weight_shape
        if rows % 16 or _int4_group(layer) is None:
            return f"its weight of {rows} x {inputs} does not fit groups of 32, 64, 128 or 256 and rows of 16"
        return None

    def bind(self, layer: PackedModule) -> Run:
        rows, inputs = layer.weight_shape
        group = _int4_group(layer)
        assert group is not None
        # The kernel's weight is (integer - 8) * scale + zero; ours (integer [+ 1/2] - zero) * step.
        integers, step, offset = affine_weight(layer)
        unsigned = integers.int() + 8
        if unsigned.is_cuda:
            pairs_of = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).to(torch.uint8)
            tiles = next(tiles for tiles in (8, 4, 2) if inputs % (16 * tiles) == 0)
            packed = torch.ops.aten._convert_weight_to_int4pack(pairs_of, tiles)
            product = torch.ops.aten._weight_int4pack_mm
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
            product = torch.ops.aten._weight_int4pack_mm_for_cpu
        pairs = torch.stack([step, offset * step], dim=-1)  # [rows, groups, 2]
        pairs = pairs.repeat_interleave(inputs // group // pairs.shape[1], dim=1)
        pairs, bias = pairs.transpose(0, 1).contiguous().bfloat16(), _bias(layer)

        def run(x: Tensor) -> Tensor:
            y = product(x.reshape(-1, inputs).bfloat16(), packed, group, pairs)
            return _biased(y.to(x.dtype).view(*x.shape[:-1], rows), bias)

        return run


def _int4_group(layer: PackedModule) -> int | None:
    """Returns the largest group of the kernel that lies inside the layer's own."""
    own = layer.bits.group_size or layer.weight_shape[1]
    return next((size for size in (256, 128, 64, 32) if own % size == 0), None)


class _Int8Weight(Kernel):
    """torch's 8-bit weights a channel; any width fits."""

    name, tolerance = "int8_weight", 2e-2

    def refuses(self, layer: PackedModule) -> str | None:
        if (reason := _unlike(layer, False, "cpu", "cuda")) is not None:
            return reason
        if layer.bits.group_size:
            return "its weight has groups"
        # torch reads past the end of other rows, and may crash.
        return f"its {layer.weight_shape[1]} inputs are no multiple of 16" if layer.weight_shape[1] % 16 else None

    def bind(self, layer: PackedModule) -> Run:
        integers, scale = _whole(layer)
        scale, bias = scale.bfloat16(), _bias(layer)
        rows, inputs = layer.weight_shape

        def run(x: Tensor) -> Tensor:
            y = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, inputs).bfloat16(), integers, scale)
            return _biased(y.to(x.dtype).view(*x.shape[:-1], rows), bias)

        return run


class _Int8(FoldingKernel):
    """oneDNN's product of 8-bit inputs and 8-bit weights, accumulated in 32-bit integers."""

    name, tolerance = "int8", 1e-4

    def refuses(self, layer: PackedModule) -> str | None:
        if not (is_plain(layer, nn.Linear) or is_plain(layer, nn.Conv2d)):
            return "it is not a plain Linear or Conv2d layer"
        if layer.bits.activation == FLOAT_BITS:
            return "its input is not quantized"
        if layer.bits.dynamic:
            return "each row of its input has a step of its own"
        if layer.bits.group_size:
            return "its weight has groups"
        if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
            return "its padding is not a number of zeros"
        if layer.weight_packed.device.type != "cpu" or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
            return "it is for CPUs with oneDNN"
        if may_clip(layer.bits.weight, layer.bits.activation) and saturates():
            return "this processor, which has no VNNI, clips sums of 8-bit inputs times 8-bit weights"
        return None

    def bind(self, layer: PackedModule, norm: Affine | None = None) -> Run:
        integers, scale = _whole(layer)
        quantized, step, zero_point = input_quantizer(layer)
        zeros = torch.zeros(layer.weight_shape[0], dtype=torch.int32)
        bias = _bias(layer)
        bias = None if bias is None else bias.float()
        if norm is not None:
            scale, bias = scale * norm[0], norm[1] if bias is None else bias * norm[0] + norm[1]
        if isinstance(layer, nn.Conv2d):
            settings = [list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups]  # type: ignore[arg-type]
            packed = torch.ops.onednn.qconv_prepack(integers, scale, step, zero_point, *settings)

            def convolve(x: Tensor) -> Tensor:
                if x.dim() == 3:  # one sample, without a batch
                    return convolve(x[None])[0]
                y = torch.ops.onednn.qconv2d_pointwise(
                    quantized(x), step, zero_point, packed, scale, zeros, bias, *settings, *PLAIN_OUTPUT
                )
                return y.to(x.dtype)

            return convolve
        packed, rows = torch.ops.onednn.qlinear_prepack(integers, None), layer.weight_shape[0]

        def multiply(x: Tensor) -> Tensor:
            y = torch.ops.onednn.qlinear_pointwise(
                quantized(x), step, zero_point, packed, scale, zeros, bias, *PLAIN_OUTPUT
            )
            return y.to(x.dtype).view(*x.shape[:-1], rows)  # of no rows it has no other dimensions

        return multiply


class _Int8MatMul(Kernel):
    """torch's plain product of 8-bit matrices, for devices without oneDNN; steps and zero points come after."""

    name, tolerance = "int8_matmul", 1e-4
    #: cuBLAS takes no fewer rows.
    least_rows = 32

    def refuses(self, layer: PackedModule) -> str | None:
        if (reason := _unlike(layer, True, "cpu", "cuda")) is not None:
            return reason
        if layer.bits.group_size:
            return "its weight has groups"
        rows, inputs = layer.weight_shape
        return f"its weight of {rows} x {inputs} is not in multiples of 8" if rows % 8 or inputs % 8 else None

    def bind(self, layer: PackedModule) -> Run:
        integers, scale = _whole(layer)
        rows, inputs = layer.weight_shape
        weight, sums = integers.T, integers.sum(1, dtype=torch.int32)
        bias, least = _bias(layer), self.least_rows

        def product(flat: Tensor) -> Tensor:
            # Inputs of 0 to 255 are moved into signed integers, and what that takes from each sum is given back.
            moved = (flat.to(torch.int16) - 128).to(torch.int8)
            count = moved.shape[0]
            if count < least:
                moved = F.pad(moved, (0, 0, 0, least - count))
            return torch._int_mm(moved, weight)[:count] + 128 * sums

        def biased(y: Tensor, x: Tensor) -> Tensor:
            return _biased(y.to(x.dtype).view(*x.shape[:-1], rows), bias)

        if layer.bits.dynamic:
            bits = layer.bits.activation

            def run_dynamic(x: Tensor) -> Tensor:
                found, step, zero = quantize_rows(x.reshape(-1, inputs), bits)
                return biased((product(found) - zero.to(torch.int32) * sums) * (step * scale), x)

            return run_dynamic
        quantized, step, zero_point = input_quantizer(layer)
        factor, shift = scale * step, zero_point * sums

        def run(x: Tensor) -> Tensor:
            return biased((product(quantized(x).reshape(-1, inputs)) - shift) * factor, x)

        return run


def norm_of(x: Tensor) -> float:
    """Returns the norm of a tensor; in float32, since float16 ends at 65504."""
    return float(x.detach().float().norm())


def _whole(layer: PackedModule) -> tuple[Tensor, Tensor]:
    """Returns a weight of whole channels as int8 integers in its shape and float32 steps."""
    integers, step, _ = affine_weight(layer)
    return integers.view(layer.weight_shape), step.view(-1)


def _bias(layer: PackedModule) -> Tensor | None:
    bias = layer._parameters.get("bias")
    return None if bias is None else bias.detach()


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    # Under autocast the bias may be wider than what the layer's own forward gives.
    return y if bias is None else y + bias.to(y.dtype)


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for kernel in (_BFloat16(), _Int4(), _Int8Weight(), _Int8(), _Int8MatMul())
}
