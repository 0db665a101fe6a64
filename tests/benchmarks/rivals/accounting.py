"""One way of counting bytes for every rival, that of the files that they write.

A weight of b bits is b bits, packed. A scale is 2 bytes, an integer zero point 1 byte unless the tool packs it
narrower, a float one 2 bytes; how many there are is the tool's. A quantized input has a scale and a zero point.
Everything else stays float, 4 bytes an element; BatchNorm is the bias that it folds into.
Effective bits are those of the layers' weights, with their scales and zero points, a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hq_plugin.stored_qparams import ACTIVATION_QPARAM_BYTES

FLOAT_BYTES, SCALE_BYTES = 4, 2


def layer_bytes(layer: Mapping[str, Any]) -> float:
    """Returns the bytes of one layer's weight: `bits`, `elements`, `scales`, `zeros` of `zero_bits` each."""
    if layer["bits"] >= 16:  # left alone by the tool: it is what it was
        return FLOAT_BYTES * float(layer["elements"])
    packed = math.ceil(layer["elements"] * layer["bits"] / 8)
    zeros = layer.get("zeros", 0) * layer.get("zero_bits", 8) / 8
    return packed + SCALE_BYTES * layer.get("scales", 0) + zeros


def count(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns `bytes` and `effective_bits` of a result.

    Args:
        result: `layers`, by name; `activation_tensors`, how many inputs are quantized; `float_elements`, how
            many numbers there are beside the layers' weights.
    """
    layers = result["layers"].values()
    weights = sum(layer_bytes(layer) for layer in layers)
    rest = ACTIVATION_QPARAM_BYTES * result["activation_tensors"] + FLOAT_BYTES * result["float_elements"]
    return {
        "bytes": math.ceil(weights + rest),
        "effective_bits": 8 * weights / sum(layer["elements"] for layer in layers),
    }
