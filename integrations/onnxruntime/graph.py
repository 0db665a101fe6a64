"""What is done to an exported graph: integers in their own width, affine maps folded into convolutions."""

from __future__ import annotations

import re

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_NARROW = {4: TensorProto.INT4}


def strip(model: onnx.ModelProto) -> None:
    """Takes out what the exporter notes for debugging, such as the paths of source files."""
    del model.metadata_props[:]
    for entry in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        entry.ClearField("doc_string")
        del entry.metadata_props[:]
    del model.graph.value_info[:]


def narrow_integers(model: onnx.ModelProto) -> None:
    """Stores integers of 4 bits as such; a cast, which the runtime does once on loading, widens them again."""
    graph = model.graph
    casts = []
    for tensor in list(graph.initializer):
        match = re.search(r"weight_int(\d)$", tensor.name)
        if match is None or int(match.group(1)) not in _NARROW:
            continue
        values = numpy_helper.to_array(tensor)
        narrow = helper.make_tensor(
            f"{tensor.name}.packed", _NARROW[int(match.group(1))], values.shape, values.reshape(-1).tolist()
        )
        casts.append(helper.make_node("Cast", [narrow.name], [tensor.name], to=TensorProto.INT8))
        graph.initializer.remove(tensor)
        graph.initializer.append(narrow)
    for cast in reversed(casts):
        graph.node.insert(0, cast)


def fold_affine(model: onnx.ModelProto) -> None:
    """Folds a BatchNorm that follows a convolution with integer weights into its steps and its bias.

    Exact: the step of a channel takes over the factor. A channel whose factor is not positive keeps its layer,
    since a step must be positive.
    """
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        conv = producers.get(norm.input[0])
        if conv is None or conv.op_type != "Conv" or len(readers[conv.output[0]]) != 1:
            continue
        weight = producers.get(conv.input[1])
        if weight is None or weight.op_type != "DequantizeLinear" or len(readers[weight.output[0]]) != 1:
            continue
        names = [weight.input[1], *norm.input[1:5], *conv.input[2:3]]
        if any(name not in constants for name in names):
            continue
        step, scale, shift, mean, variance, *bias = (numpy_helper.to_array(constants[name]) for name in names)
        epsilon = next((float(entry.f) for entry in norm.attribute if entry.name == "epsilon"), 1e-5)
        factor = scale / np.sqrt(variance + np.float32(epsilon))
        if not (factor > 0).all():
            continue
        old = bias[0] if bias else np.float32(0)
        prefix = conv.name or conv.output[0]
        new_step = numpy_helper.from_array((step * factor).astype(np.float32), f"{prefix}.folded_step")
        new_bias = numpy_helper.from_array(
            ((old - mean) * factor + shift).astype(np.float32), f"{prefix}.folded_bias"
        )
        graph.initializer.extend([new_step, new_bias])
        weight.input[1] = new_step.name
        inputs = [*conv.input[:2], new_bias.name]
        del conv.input[:]
        conv.input.extend(inputs)
        conv.output[0] = norm.output[0]
        graph.node.remove(norm)
    _drop_unused(graph)


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {entry.name for entry in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
