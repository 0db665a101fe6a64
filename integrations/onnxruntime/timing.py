"""How long a layer and a model take in ONNX Runtime, for profiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from hq_plugin.batch import Batch
from hq_plugin.integrations.onnxruntime.export import to_onnx
from hq_plugin.integrations.onnxruntime.layers import exported_layer, form
from hq_plugin.integrations.onnxruntime.sessions import open_session
from hq_plugin.nn import PackedModule
from hq_plugin.nn.saturation import may_clip
from hq_plugin.timing import MODEL_SECONDS, median_milliseconds

#: Times by what decides them: a layer's shape and settings, its operator, the width of its integers, its input.
_known: dict[tuple[Any, ...], float] = {}


def layer_milliseconds(layer: PackedModule, x: Tensor) -> dict[str, float]:
    """Times a packed layer alone, on the one operator that it becomes."""
    operator, width = form(exported_layer(layer, 4))
    # Integers of 4 bits are widened once on loading, except in MatMulNBits.
    runs = width if operator == "MatMulNBits" else 8
    settings = super(PackedModule, layer).extra_repr()
    key = (
        type(layer).__name__,
        settings,
        operator,
        runs,
        layer.bits.activation,
        layer.bits.dynamic,
        layer.bits.group_size,
        may_clip(layer.bits.weight, layer.bits.activation),  # exact sums of these are slower where x86 lacks VNNI
        (tuple(x.shape), x.dtype),
        torch.get_num_threads(),
    )
    if key not in _known:
        _known[key] = median_milliseconds(_runner(nn.Sequential(layer), (x,), {}))
    return {operator: _known[key]}


def model_milliseconds(model: nn.Module, batch: Batch) -> float:
    """Times a packed model on a batch."""
    return median_milliseconds(_runner(model, batch.args, batch.kwargs), seconds=MODEL_SECONDS)


def _runner(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any]:
    """Returns what runs a model once in ONNX Runtime."""
    content = to_onnx(model, args, kwargs, accuracy_level=4)
    session: onnxruntime.InferenceSession = open_session(content.SerializeToString(), torch.get_num_threads())
    values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    feed = {entry.name: np.asarray(value) for entry, value in zip(session.get_inputs(), values, strict=True)}
    return lambda: session.run(None, feed)
