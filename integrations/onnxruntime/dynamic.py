"""Linear layers whose input gets a step and a zero point for each row, as they are exported.

ONNX's DynamicQuantizeLinear has one for the whole tensor, so the rows' are computed by plain operators; the product
is one of integers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.onnx import ops

from hq_plugin.integrations.onnxruntime.readable import Readable
from hq_plugin.nn import PackedModule
from hq_plugin.quantization import quantize_rows

#: Version of the default operators: the first with attention and RMS normalization as one operator each.
OPSET = 23


class DynamicLinear(Readable):
    """A Linear with integer weights a channel, whose input is quantized row by row.

    Attributes:
        scale: float32 `[outputs]`.
        sums: float32 `[outputs]`, the sum of each channel's integers.
    """

    scale: Tensor
    sums: Tensor

    def __init__(
        self, layer: PackedModule, integers: Tensor, step: Tensor, bias: nn.Parameter | None, width: int
    ) -> None:
        """Args: the packed layer, its integers `[inputs, outputs]`, steps `[outputs]`, bias, and their width."""
        super().__init__()
        self._name, self._bits = f"weight_int{width}", layer.bits.activation
        self.register_buffer(self._name, integers)
        self.register_buffer("scale", step)
        self.register_buffer("sums", integers.sum(0, dtype=torch.int32).float())
        self.bias = bias

    def forward(self, input: Tensor) -> Tensor:
        """Multiplies by the weight; only inside an export."""
        self.note_run()
        x = input  # which some call by its name
        found, step, zero = quantize_rows(x, self._bits)
        weight = getattr(self, self._name)
        product: Tensor = ops.symbolic(
            "MatMulInteger",
            (found.to(torch.uint8), weight),
            dtype=torch.int32,
            shape=(*x.shape[:-1], weight.shape[1]),
            version=OPSET,
        )
        y = (product.float() - zero * self.sums) * (step * self.scale)
        return y if self.bias is None else y + self.bias
