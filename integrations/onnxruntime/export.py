"""Writes packed models as ONNX files: `torch.export` of the model with its layers in their exported form."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten

from hq_plugin import adapters
from hq_plugin.distribution import in_first, is_first
from hq_plugin.errors import ArtifactPathError, ExportError, HQWarning, ModelError
from hq_plugin.integrations.onnxruntime import graph
from hq_plugin.integrations.onnxruntime.causal import CausalForward, causal_inputs, is_causal
from hq_plugin.integrations.onnxruntime.dynamic import OPSET
from hq_plugin.integrations.onnxruntime.layers import exported_layer, form
from hq_plugin.integrations.onnxruntime.rewrites import Rewritten
from hq_plugin.integrations.onnxruntime.sessions import EXACT_SUMS
from hq_plugin.integrations.onnxruntime.tables import merge_tables
from hq_plugin.integrations.onnxruntime.verify import difference
from hq_plugin.nn import check_unedited, packed_modules, replace_modules
from hq_plugin.nn.saturation import may_clip, saturates
from hq_plugin.policy import FLOAT_BITS, LayerBits
from hq_plugin.storage import check_file_place, write_bytes

#: Files above this size cannot be one protobuf message.
_LARGEST = 2_000_000_000
#: Outputs that differ by more than this are not what rounding makes of them.
_TOLERANCE = 0.25


@dataclass(frozen=True)
class ExportedLayer:
    """What became of one packed layer.

    Attributes:
        name: Its name.
        bits: Its widths.
        width: Bits of an integer in the file: the next width that the runtime has.
        operator: The runtime's operator.
    """

    name: str
    bits: LayerBits
    width: int
    operator: str


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: The file.
        size: Its bytes.
        layers: What became of each packed layer.
        difference: By how much the outputs of the file differ from those of the model on the example inputs,
            relative to their norm; None where ONNX Runtime is not installed, or nobody can tell.
    """

    path: Path
    size: int
    layers: tuple[ExportedLayer, ...]
    difference: float | None = None

    @property
    def widened(self) -> tuple[ExportedLayer, ...]:
        """The layers whose integers are wider in the file than in the policy."""
        return tuple(layer for layer in self.layers if layer.width != layer.bits.weight)

    @property
    def clipped(self) -> tuple[ExportedLayer, ...]:
        """The layers whose sums ONNX Runtime clips on x86 without VNNI, unless a session asks for exact ones.

        Their weights and inputs both have 8 bits, and are multiplied as integers.
        """
        return tuple(
            layer
            for layer in self.layers
            if layer.bits.activation != FLOAT_BITS
            and may_clip(layer.bits.weight, layer.bits.activation)
            and not layer.bits.group_size
        )

    def __str__(self) -> str:
        rows = [f"{self.path}: {self.size:,} bytes, {len(self.layers)} packed layers"]
        if self.difference is not None:
            rows.append(f"  its outputs differ from the model's by {self.difference:.2%}")
        rows += [
            f"  {layer.name}: {layer.bits.weight} bits, {layer.width} in the file ({layer.operator})"
            for layer in self.layers
        ]
        if self.clipped:
            rows.append(f"  {_clipping(self.clipped)}")
        return "\n".join(rows)


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any = None,
    *,
    cache: bool | None = None,
    accuracy_level: int = 4,
) -> Exported:
    """Writes a packed model as an ONNX file.

    Linear layers with float inputs become `MatMulNBits` of 2, 4 or 8 bits, layers with quantized inputs
    quantized operators with 4- and 8-bit integers; other widths are widened to the next of these. Weights
    with fractional zero points need a small float product beside: `zero_points="whole"` avoids it.

    Args:
        model: What `quantize` or `load` returned; it is not changed.
        path: The file; it appears whole or not at all.
        example_inputs: Inputs of one forward: a tensor, a tuple, or a dict of named inputs. Batch size, and
            the length of token sequences, stay free. None takes what the library that the model is from
            proposes.
        cache: Whether keys and values of earlier tokens are inputs and outputs (`past.0`, `present.0`, ...), so
            that a language model generates token by token. None does it for models that generate text.
        accuracy_level: Of `MatMulNBits`: 4 computes in 8-bit integers and is fastest, 1 in float32.

    Returns:
        What became of each layer, and how far the file is from the model. It warns where that is far.

    Raises:
        ModelError: The model holds no packed layer.
        ExportError: An operator cannot be exported, or the file cannot be written.
    """
    model = adapters.opened(model)
    if not packed_modules(model):
        raise ModelError("The model holds no packed layer. Call hq_plugin.quantize on it first.")
    check_unedited(model)
    try:
        in_first(lambda: check_file_place(Path(path)))
    except ArtifactPathError as error:
        raise ExportError(str(error)) from error
    # What is compared with the file runs in eval mode and, as the file does, in float32 on the CPU.
    model = nn.Module.float(copy.deepcopy(model).eval().cpu())  # transformers forbids its own
    causal = is_causal(model)
    if cache and not causal:
        raise ExportError(f"{type(model).__name__} does not generate text from a cache. Leave cache=None.")
    prepared, forms = _exported_form(model, accuracy_level)
    if causal and cache is not False:
        kwargs, shapes = causal_inputs(model)
        written = _improved(_translated(CausalForward(prepared), (), kwargs, shapes))
        made, args = CausalForward(model), ()
    else:
        args, kwargs = _inputs(model, example_inputs)
        written = _improved(_translated(_without_cache(prepared), args, kwargs, _dynamic(args, kwargs)))
        made = model
    layers = tuple(
        ExportedLayer(name, layer.bits, *reversed(form(forms[name])))
        for name, layer in packed_modules(model).items()
    )
    target = Path(path).expanduser()

    def write() -> tuple[int, float | None]:
        _write(written, target)
        return target.stat().st_size, _verified(target, made, args, kwargs)

    size, found = in_first(write)
    exported = Exported(target, size, layers, found)
    if exported.clipped and is_first() and saturates():
        warnings.warn(f"This processor has no VNNI. {_clipping(exported.clipped)}", HQWarning, stacklevel=3)
    return exported


def _clipping(layers: tuple[ExportedLayer, ...]) -> str:
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    name, value = EXACT_SUMS
    return (
        f"Weights and inputs of 8 bits ({layers[0].name}{more}): on x86 without VNNI, ONNX Runtime clips sums of "
        f'their products unless the session\'s options have add_session_config_entry("{name}", "{value}"). '
        "Weights of up to 7 bits are not concerned."
    )


def _verified(path: Path, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """Returns how far a file is from its model; warns where that is far, or where the file does not run."""
    found = None
    try:
        found = difference(path, model, args, kwargs)
    except Exception as error:  # whatever the runtime makes of a file
        said = f"was written, but ONNX Runtime does not run it here: {error}"
    else:
        if found is None or found <= _TOLERANCE:
            return found
        said = (
            f"computes something else: on the example inputs its outputs differ from the model's by {found:.0%}. "
            "Integers of 8 bits in place of floats explain a few percent of that at most (accuracy_level=1 "
            "computes in float32)."
        )
    warnings.warn(f"{path} {said}", HQWarning, stacklevel=6)
    return found


def to_onnx(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, accuracy_level: int
) -> onnx.ModelProto:
    """Returns a packed model, for inputs of these sizes alone, without a cache."""
    prepared = _without_cache(_exported_form(model, accuracy_level)[0])
    return _improved(_translated(prepared, args, kwargs, None))


def _without_cache(model: nn.Module) -> nn.Module:
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # the copy's: a cache is not a tensor
    return model


def _improved(written: onnx.ModelProto) -> onnx.ModelProto:
    graph.widen_masks(written)
    graph.strip(written)
    graph.share_rotations(written)
    graph.fold_affine(written)
    graph.quantize_before_clip(written)
    graph.integer_products(written)
    graph.separate_zeros(written)
    graph.narrow_integers(written)
    return written


def _exported_form(model: nn.Module, accuracy_level: int) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Returns a copy of a model with its packed layers in their exported form, tied ones once, and these layers."""
    if accuracy_level not in range(5):
        raise ExportError(f"accuracy_level={accuracy_level!r} is not possible: give 0 to 4.")
    made: Any = copy.deepcopy(model).eval().cpu()
    if hasattr(made, "set_experts_implementation"):
        # transformers' other ways to compute a mixture of experts depend on which expert each token takes.
        made.set_experts_implementation("batched_mm")
    layers = packed_modules(made)
    forms = {id(layer): exported_layer(layer, accuracy_level) for layer in layers.values()}
    exported = replace_modules(made, forms).requires_grad_(False)
    merge_tables(exported)
    return exported, {name: forms[id(layer)] for name, layer in layers.items()}


def _inputs(model: nn.Module, given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns arguments and named arguments of one forward, for a batch of at least two."""
    if given is None:
        adapter = adapters.find(model)
        if adapter is None:
            raise ExportError("example_inputs are needed: a tensor, a tuple, or a dict, as the forward takes them.")
        args, kwargs = adapter.example_inputs(model)
    elif isinstance(given, Mapping):
        args, kwargs = (), dict(given)
    else:
        args, kwargs = (tuple(given) if isinstance(given, (tuple, list)) else (given,)), {}
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    found: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(Tensor, _as_exported, (args, kwargs))
    tensors = [value for value in tree_leaves(found) if isinstance(value, Tensor) and value.dim()]
    if any(value.shape[0] != 1 for value in tensors):
        if tensors[0].shape[0] == 1:
            warnings.warn(
                "The first of example_inputs is one sample beside tensors of more rows: its batch size stays 1 in "
                "the file. Give example inputs of two samples to have it free.",
                HQWarning,
                stacklevel=4,
            )
        return found  # what has one row beside those with more is for all of them
    # A batch of one would be taken for a constant.
    return tree_map_only(Tensor, lambda value: torch.cat([value, value]) if value.dim() else value, found)  # type: ignore[no-any-return]


def _as_exported(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    # What a slice's strides are is no property of inputs, and torch would write it into the graph.
    return (value.float() if value.is_floating_point() else value).contiguous()


def _dynamic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | tuple[Any, ...]:
    """Returns which sizes stay free: the batch, and the length of token sequences."""

    def of(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: of(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [of(part) for part in value]
        if not isinstance(value, Tensor) or value.dim() == 0:
            return None
        free = {0: torch.export.Dim.AUTO}
        if value.dim() == 2 and not value.is_floating_point():
            free[1] = torch.export.Dim.AUTO
        return free

    if kwargs:
        return {name: of(value) for name, value in kwargs.items()}
    return tuple(of(value) for value in args)


def _translated(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> onnx.ModelProto:
    with torch.no_grad(), warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        with _Where(model) as where, Rewritten():
            try:
                program = torch.export.export(
                    model,
                    args,
                    kwargs,
                    dynamic_shapes=shapes,
                    strict=False,
                    prefer_deferred_runtime_asserts_over_guards=True,
                )
            except Exception as error:  # whatever the model's own code makes of symbolic sizes
                raise ExportError(_message(error, where.layer)) from error
        if "past" in kwargs:
            names: list[str] | None = ["logits", *(f"present.{i}" for i in range(len(kwargs["past"])))]
        else:
            names = _output_names(program, kwargs)
        # Fused successive Clips of onnxscript (0.7) may lose their bounds; without its rewriting they stay two.
        for optimize in (True, False):
            try:
                translated = torch.onnx.export(
                    program,
                    args,
                    kwargs=kwargs,
                    dynamo=True,
                    opset_version=OPSET,
                    output_names=names,
                    optimize=optimize,
                    verbose=False,
                )
            except Exception as error:  # whatever a translation raises
                raise ExportError(_message(error, _layer_of(program, error))) from error
            assert translated is not None
            proto: onnx.ModelProto = translated.model_proto
            if graph.is_whole(proto):
                break
    return proto


def _output_names(program: torch.export.ExportedProgram, kwargs: Mapping[str, Any]) -> list[str] | None:
    """Returns the outputs' names where a model has named outputs (a dict, transformers' ModelOutput), else None."""
    spec = program.call_spec.out_spec
    assert spec is not None
    places = tree_unflatten(list(range(spec.num_leaves)), spec)
    if not isinstance(places, Mapping):
        return None
    named = {
        index: name if isinstance(value, int) else f"{name}.{number}"
        for name, value in places.items()
        for number, index in enumerate(tree_leaves(value))
    }
    # What is no tensor is not in the file.
    outputs = program.graph_signature.user_outputs
    names = [named[index] for index, output in enumerate(outputs) if isinstance(output, str)]
    return None if {*names} & {*kwargs} else names


class _Where:
    """Inside, follows which layer of a model is running."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.running = model, [""]
        self.handles: list[Any] = []

    @property
    def layer(self) -> str:
        """The innermost layer that was entered and not left."""
        return self.running[-1]

    def __enter__(self) -> _Where:
        for name, module in self.model.named_modules():
            self.handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name)))
            self.handles.append(module.register_forward_hook(lambda *_: self._left()))
        return self

    def _left(self) -> None:
        self.running.pop()

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the exporter's logs and its prints of whole graphs are off: the error says what matters."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _layer_of(program: torch.export.ExportedProgram, error: BaseException) -> str:
    """Returns the layer of the node that a translation stopped at."""
    found = re.search(r"Error when translating node %(\w+)", "\n".join(str(one) for one in _causes(error)))
    for node in program.graph.nodes:
        # The node may stem from one of a longer name: `bessel_j0` from `special_bessel_j0`.
        if found and node.name.endswith(found.group(1)):
            stack = list(node.meta.get("nn_module_stack", {}).values())
            return str(stack[-1][0]) if stack else ""
    return ""


def _causes(error: BaseException) -> list[BaseException]:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and len(causes) < 20:
        causes.append(cause)
    return causes


def _message(error: BaseException, layer: str) -> str:
    """Returns the innermost cause in one line, with the layer where it is known."""
    last = _causes(error)[-1]
    lines = [line.strip() for line in str(last).splitlines() if line.strip()]
    at = f" at layer {layer!r}" if layer else ""
    return (
        f"The model cannot be exported{at}: {lines[0] if lines else type(last).__name__}. Replace that "
        "operation, or export the part of the model without it."
    )


def _write(model: onnx.ModelProto, target: Path) -> None:
    if model.ByteSize() > _LARGEST:
        raise ExportError(f"The model has {model.ByteSize():,} bytes; a single ONNX file holds two gigabytes.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, model.SerializeToString())
    except OSError as error:
        raise ExportError(f"{target} could not be written: {error}. Choose a writable place with room.") from error
