"""What is done to an exported graph: integers in their own width, and convolutions that run on them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

#: Types of attributes that hold bodies.
_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
#: Domain of the operators that ONNX Runtime has beside the standard's.
_CONTRIB = "com.microsoft"


def is_whole(model: onnx.ModelProto) -> bool:
    """Whether every input of a node is one of the model, a constant, or another node's output."""
    known = {value.name for value in (*model.graph.input, *model.graph.initializer)} | {""}
    known.update(name for node in model.graph.node for name in node.output)
    return all(name in known for node in model.graph.node for name in node.input)


def strip(model: onnx.ModelProto) -> None:
    """Takes out what the exporter notes for debugging, such as the paths of source files."""
    del model.metadata_props[:]
    for entry in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        entry.ClearField("doc_string")
        del entry.metadata_props[:]
    del model.graph.value_info[:]


def separate_zeros(model: onnx.ModelProto) -> None:
    """Gives every dequantized weight zero points of its own, which torch's exporter merges where they are equal.

    ONNX Runtime (1.32) fails to open a file with merged ones where it is to compute exact sums: it makes unsigned
    integers of weights and of their zero points, and cannot make the same ones twice.
    """
    graph = model.graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, int] = {}
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in values or len(node.input) < 3:
            continue
        name = node.input[2]
        readers[name] = readers.get(name, 0) + 1
        if readers[name] > 1:
            copied = onnx.TensorProto()
            copied.CopyFrom(values[name])
            copied.name = node.input[2] = f"{name}.{readers[name]}"
            graph.initializer.append(copied)


def narrow_integers(model: onnx.ModelProto) -> None:
    """Stores integers of 4 bits as such; a cast, which the runtime does once on loading, widens them again."""
    graph = model.graph
    casts = []
    for tensor in list(graph.initializer):
        if not re.search(r"weight_int\d$", tensor.name):
            continue
        values = numpy_helper.to_array(tensor)
        if values.min() < -8 or values.max() > 7:
            continue
        # Raw bytes, the first of two in the lower bits: as a list, onnx stores up to two bytes for each byte.
        flat = np.pad(values.reshape(-1), (0, values.size % 2)).view(np.uint8) & 15
        packed = (flat[0::2] | flat[1::2] << 4).astype(np.uint8).tobytes()
        narrow = helper.make_tensor(f"{tensor.name}.packed", TensorProto.INT4, values.shape, packed, raw=True)
        casts.append(helper.make_node("Cast", [narrow.name], [tensor.name], to=TensorProto.INT8))
        graph.initializer.remove(tensor)
        graph.initializer.append(narrow)
    for cast in reversed(casts):
        graph.node.insert(0, cast)


class _Graph:
    """A graph with its nodes by what they write and read, and its constants."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.producers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._returned = {entry.name for entry in graph.output}

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """Returns the node that reads a value, if there is one alone and the graph does not return the value."""
        nodes = self.readers.get(name, [])
        return nodes[0] if len(nodes) == 1 and name not in self._returned else None

    def constant(self, name: str) -> NDArray[Any] | None:
        """Returns the value of a constant, or None."""
        return numpy_helper.to_array(self._constants[name]) if name in self._constants else None

    def add_constant(self, name: str, value: NDArray[Any]) -> str:
        """Adds a constant; returns its name."""
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def convolutions(self) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
        """Returns each convolution with integer weights, and what dequantizes them."""
        found = []
        for node in self.graph.node:
            weight = self.producers.get(node.input[1]) if node.op_type == "Conv" else None
            if weight is not None and weight.op_type == "DequantizeLinear":
                found.append((node, weight))
        return found


def share_rotations(model: onnx.ModelProto) -> None:
    """Gives all layers that rotate by the same angles one table of cosines and one of sines, a row for each sample.

    The exporter writes a table for each `RotaryEmbedding`, of one row where positions do not depend on the sample;
    the runtime wants as many rows as there are samples.
    """
    graph = _Graph(model.graph)
    tables: dict[str, list[str]] = {}
    for node in list(model.graph.node):
        if node.op_type != "RotaryEmbedding" or len(node.input) != 3:
            continue
        cos, sin = (graph.producers.get(name) for name in node.input[1:])
        if cos is None or sin is None or (cos.op_type, sin.op_type) != ("Cos", "Sin"):
            continue
        angles = cos.input[0]
        if sin.input[0] != angles:
            continue
        if angles not in tables:
            names = [f"{angles}.{part}" for part in ("samples", "shape", "rows", "cos", "sin")]
            samples, shape, rows, *tables[angles] = names
            ones = graph.add_constant(f"{angles}.ones", np.ones(2, dtype=np.int64))
            _insert_before(
                model.graph,
                node,
                helper.make_node("Shape", [node.input[0]], [samples], start=0, end=1),
                helper.make_node("Concat", [samples, ones], [shape], axis=0),
                helper.make_node("Expand", [angles, shape], [rows]),
                helper.make_node("Cos", [rows], [tables[angles][0]]),
                helper.make_node("Sin", [rows], [tables[angles][1]]),
            )
        _set_inputs(node, [node.input[0], *tables[angles]])
    _drop_unused(model.graph)


def widen_masks(model: onnx.ModelProto) -> None:
    """Gives a mask that is the same for all queries of an `Attention` a row for each: the runtime spreads none.

    To be called while the graph still says what shapes its values have.
    """
    graph = _Graph(model.graph)
    shapes = {entry.name: entry.type.tensor_type.shape.dim for entry in model.graph.value_info}
    widened: dict[tuple[str, str], str] = {}
    for node in list(model.graph.node):
        mask = node.input[3] if node.op_type == "Attention" and len(node.input) > 3 else ""
        dims, query = shapes.get(mask, ()), shapes.get(node.input[0] if mask else "", ())
        if len(dims) < 2 or dims[-2].dim_value != 1 or len(query) != 4 or query[2].dim_value == 1:
            continue
        key = (mask, query[2].dim_param or str(query[2].dim_value))
        if key not in widened:
            name = widened[key] = f"{mask}.{key[1]}"
            before = graph.add_constant(f"{name}.before", np.ones(len(dims) - 2, dtype=np.int64))
            after = graph.add_constant(f"{name}.after", np.ones(1, dtype=np.int64))
            _insert_before(
                model.graph,
                node,
                helper.make_node("Shape", [node.input[0]], [f"{name}.queries"], start=2, end=3),
                helper.make_node("Concat", [before, f"{name}.queries", after], [f"{name}.shape"], axis=0),
                helper.make_node("Expand", [mask, f"{name}.shape"], [name]),
            )
        _set_inputs(node, [*node.input[:3], widened[key], *node.input[4:]])


def fold_affine(model: onnx.ModelProto) -> None:
    """Folds a BatchNorm that follows a convolution with integer weights into its steps and its bias.

    Exact: the step of a channel takes over the size of the factor, and its integers the sign. A channel that
    holds -128 and whose sign turns has no such integers; its BatchNorm stays.
    """
    graph = _Graph(model.graph)
    for conv, weight in graph.convolutions():
        norm = graph.only_reader(conv.output[0])
        if norm is None or norm.op_type != "BatchNormalization" or len(graph.readers[weight.output[0]]) != 1:
            continue
        names = [*weight.input[:2], *norm.input[1:5], *conv.input[2:3]]
        values = [graph.constant(name) for name in names]
        if any(value is None for value in values):
            continue
        integers, step, scale, shift, mean, variance, *bias = (np.asarray(value) for value in values)
        epsilon = next((float(entry.f) for entry in norm.attribute if entry.name == "epsilon"), 1e-5)
        factor = scale / np.sqrt(variance + np.float32(epsilon))
        sign = np.sign(factor).astype(np.int16).reshape(-1, *(1,) * (integers.ndim - 1))
        turned = integers.astype(np.int16) * sign
        if turned.max() > 127:
            continue
        old = bias[0] if bias else np.float32(0)
        new_step = np.where(factor == 0, 1, step * np.abs(factor)).astype(np.float32)
        new_bias = ((old - mean) * factor + shift).astype(np.float32)
        if (sign != 1).any():
            weight.input[0] = graph.add_constant(_renamed(weight.input[0]), turned.astype(np.int8))
        weight.input[1] = graph.add_constant(f"{conv.output[0]}.step", new_step)
        _set_inputs(conv, [*conv.input[:2], graph.add_constant(f"{conv.output[0]}.bias", new_bias)])
        conv.output[0] = norm.output[0]
        model.graph.node.remove(norm)
    _drop_unused(model.graph)


def _renamed(name: str) -> str:
    """Returns another name that still says what it is to `narrow_integers`."""
    return f"turned.{name}"


def _set_inputs(node: onnx.NodeProto, names: list[str]) -> None:
    del node.input[:]
    node.input.extend(names)


def quantize_before_clip(model: onnx.ModelProto) -> None:
    """Lets a convolution's result be quantized before it is clipped, where it is quantized after.

    The runtime computes a convolution in integers only if it is quantized right after it. Rounding to the same
    integers before and after clipping changes nothing, since both keep the order of values.
    """
    graph = _Graph(model.graph)
    for conv, _ in graph.convolutions():
        clip = graph.only_reader(conv.output[0])
        quantize = None if clip is None else graph.only_reader(clip.output[0])
        if clip is None or clip.op_type not in ("Clip", "Relu") or quantize is None:
            continue
        if quantize.op_type != "QuantizeLinear":
            continue
        qparams = list(quantize.input[1:3])
        first, again = f"{conv.output[0]}.quantized", f"{conv.output[0]}.dequantized"
        _insert_before(
            model.graph,
            clip,
            helper.make_node("QuantizeLinear", [conv.output[0], *qparams], [first]),
            helper.make_node("DequantizeLinear", [first, *qparams], [again]),
        )
        clip.input[0] = again


def integer_products(model: onnx.ModelProto) -> None:
    """Computes in integers what is a product of matrices and whose result stays float.

    The runtime does so by itself for some, but not for `Gemm`, which it makes of `MatMul` and `Add`, and not for
    convolutions of one pixel, which are products over channels. One operator, since it fuses neither the
    multiplication by the steps nor the addition of the bias with `MatMulInteger` here. Larger convolutions stay:
    `ConvInteger` was slower than the float one.
    """
    graph = _Graph(model.graph)
    for node in list(model.graph.node):
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        x, weight = (graph.producers.get(name) for name in node.input[:2])
        if x is None or weight is None or {x.op_type, weight.op_type} != {"DequantizeLinear"}:
            continue
        step_in, zero, step, integers = (
            graph.constant(name) for name in (*x.input[1:3], weight.input[1], weight.input[0])
        )
        bias = graph.constant(node.input[2]) if len(node.input) > 2 else None
        if any(value is None for value in (step_in, step, integers, zero)) or (
            bias is None and len(node.input) > 2
        ):
            continue
        assert step is not None
        assert integers is not None
        # A weight that is used transposed has steps for its inputs. The runtime, too, takes them for outputs'.
        axis = _settings(weight, "axis", 1) % integers.ndim
        outputs = 0 if node.op_type == "Conv" else integers.ndim - 1
        if step.size > 1 and axis != outputs:
            _multiply_out(graph, model.graph, weight, step, [-1 if n == axis else 1 for n in range(integers.ndim)])
            continue
        if node.op_type == "Conv":
            after = graph.only_reader(node.output[0])
            if (after and after.op_type == "QuantizeLinear") or not _is_product(node, integers):
                continue
            matrix, order = integers.reshape(integers.shape[:2]).T, [0, *range(2, integers.ndim), 1]
        elif _settings(node, "transA", 0) or _settings(node, "transB", 0):
            continue
        else:
            matrix, order = integers, []
        _replace(model.graph, node, _integer_product(graph, node, x, matrix, step, bias, order))
        if all(entry.domain != _CONTRIB for entry in model.opset_import):
            model.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
    _drop_unused(model.graph)


def _multiply_out(
    graph: _Graph, proto: onnx.GraphProto, weight: onnx.NodeProto, step: NDArray[Any], shape: list[int]
) -> None:
    """Puts a product in the place of what dequantizes a weight, which the runtime would fuse with what follows."""
    if _settings(weight, "block_size", 0) or (len(weight.input) > 2 and np.any(graph.constant(weight.input[2]))):
        return
    name = weight.output[0]
    scale = graph.add_constant(f"{name}.scale", step.reshape(shape).astype(np.float32))
    cast = helper.make_node("Cast", [weight.input[0]], [f"{name}.float"], to=TensorProto.FLOAT)
    _replace(proto, weight, [cast, helper.make_node("Mul", [f"{name}.float", scale], [name])])


def _settings(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def _is_product(conv: onnx.NodeProto, integers: NDArray[Any]) -> bool:
    """Whether a convolution sees one pixel at a time, all channels together."""
    return (
        all(size == 1 for size in integers.shape[2:])
        and _settings(conv, "group", 1) == 1
        and all(stride == 1 for stride in _settings(conv, "strides", []))
        and not any(_settings(conv, "pads", []))
    )


def _integer_product(
    graph: _Graph,
    node: onnx.NodeProto,
    x: onnx.NodeProto,
    matrix: NDArray[Any],
    step: NDArray[Any],
    bias: NDArray[Any] | None,
    order: list[int],
) -> list[onnx.NodeProto]:
    """Returns the nodes that compute `node` from the integers that `x` dequantizes.

    Args:
        graph: The graph.
        node: What is replaced.
        x: What dequantizes its input.
        matrix: int8 `[inputs, outputs]`.
        step: `[outputs]`, the weight's.
        bias: `[outputs]`, or None.
        order: Permutation that puts channels last, or nothing where they are.
    """
    name = node.output[0]
    # A name that says what it is to `narrow_integers`.
    weight = graph.add_constant(f"{name}.weight_int8", matrix)
    scale = graph.add_constant(f"{name}.scale", step.reshape(-1).astype(np.float32))
    shift = "" if bias is None else graph.add_constant(f"{name}.shift", bias.reshape(-1).astype(np.float32))
    source, last, nodes = x.input[0], name, []
    if order:
        source, last = f"{name}.last", f"{name}.result"
        nodes.append(helper.make_node("Transpose", [x.input[0]], [source], perm=order))
    inputs = [source, weight, x.input[1], scale, x.input[2], "", shift]
    nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, [last], domain=_CONTRIB))
    if order:
        back = [0, len(order) - 1, *range(1, len(order) - 1)]
        nodes.append(helper.make_node("Transpose", [last], [name], perm=back))
    return nodes


def _replace(graph: onnx.GraphProto, node: onnx.NodeProto, nodes: list[onnx.NodeProto]) -> None:
    _insert_before(graph, node, *nodes)
    graph.node.remove(node)


def _insert_before(graph: onnx.GraphProto, node: onnx.NodeProto, *nodes: onnx.NodeProto) -> None:
    at = next(i for i, other in enumerate(graph.node) if other == node)
    for new in reversed(nodes):
        graph.node.insert(at, new)


def _read_names(graph: onnx.GraphProto) -> Iterator[str]:
    """Yields the names of what nodes read, those in bodies of loops and branches, too."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs) if attribute.type in _GRAPHS else ():
                yield from _read_names(body)
                yield from (value.name for value in body.output)


def _drop_unused(graph: onnx.GraphProto) -> None:
    outputs = {entry.name for entry in graph.output}
    while True:
        used = set(_read_names(graph)) | outputs
        idle = [node for node in graph.node if not used.intersection(node.output)]
        if not idle:
            break
        for node in idle:
            graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
