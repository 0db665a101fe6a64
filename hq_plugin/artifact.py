"""Saving and loading packed models: safetensors for tensors, JSON for the rest, never pickle.

A tensor that several names share is written once, and one whose elements are all equal (a folded
BatchNorm's statistics) as one number in the JSON.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hq_plugin import adapters
from hq_plugin.batchnorm import norms_to_fold
from hq_plugin.compact import REPORT_FILE, compact, expand, read_beside
from hq_plugin.cost import weight_bytes
from hq_plugin.errors import ArtifactError, ModelError
from hq_plugin.nn import PackedModule, check_unedited, packed_modules, replace_modules, with_layers_of
from hq_plugin.policy import HybridPolicy, LayerBits
from hq_plugin.result import Result
from hq_plugin.state import load_state, memory_of, state_tensors
from hq_plugin.storage import JSON_FILE, TENSOR_FILE, read_json, start_reading, write_directory
from hq_plugin.untrusted import clean_errors

FORMAT, VERSION = "hq_plugin model", 1
#: A model that is rebuilt by its name has at most so many elements for each byte of the tensor file and in any case
#: (what is constant takes no bytes there), and so many tensors for each that the file names.
_ELEMENTS_A_BYTE, _ELEMENTS, _TENSORS_AN_ENTRY = 16, 16 << 20, 16

#: How modules load parameters, where they do it as all do.
_USUAL = (nn.Module._load_from_state_dict, nn.BatchNorm2d._load_from_state_dict)
_CONSTANT_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32)
}


@dataclass(frozen=True)
class SavedSite:
    """A packed layer of a saved model: its widths, its weight's shape and its bytes."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    bits: LayerBits
    size: int


@dataclass(frozen=True)
class SavedModel:
    """What a saved model's JSON says, without reading its tensors.

    Attributes:
        sites: The packed layers.
        architecture: How to rebuild the float model, or None.
        result: The report, or None.
        file_bytes: Size of the tensor file.
    """

    sites: tuple[SavedSite, ...]
    architecture: dict[str, Any] | None
    result: Result | None
    file_bytes: int


def save(model: nn.Module, directory: str | Path, *, overwrite: bool = False) -> Path:
    """Saves a packed model into a directory, whole or not at all.

    Args:
        model: What `quantize` or `torch_ao.convert` returned.
        directory: A new or empty directory. The histories in the model's report are thinned.
        overwrite: Whether a model saved there before is replaced.

    Returns:
        The directory.

    Raises:
        ModelError: The model holds no packed layer, or its dequantized weights were edited.
        ArtifactPathError: The directory holds something else, or cannot be written.
    """
    model = adapters.opened(model)
    packed = packed_modules(model)
    if not packed:
        raise ModelError("The model holds no packed layer. Call hq_plugin.quantize on it first.")
    check_unedited(model)
    written: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    constants: dict[str, Any] = {}
    first: dict[tuple[Any, ...], str] = {}
    # What costs count as gone is so, and a number alone is no constant otherwise: it is one of the model's values.
    statistics = [tensor for norm in norms_to_fold(model) for tensor in norm.buffers(recurse=False)]
    folded = {memory_of(tensor) for tensor in statistics}
    for name, tensor in state_tensors(model).items():
        owner = first.setdefault(memory_of(tensor), name) if tensor.numel() else name
        if owner != name:
            tied[name] = owner
        elif (tensor.numel() > 1 or memory_of(tensor) in folded) and (value := _constant(tensor)) is not None:
            dtype = str(tensor.dtype).removeprefix("torch.")
            constants[name] = {"shape": list(tensor.shape), "dtype": dtype, "value": value}
        else:
            # A copy, since safetensors refuses views of one memory.
            written[name] = tensor.clone()
    result: Result | None = getattr(model, "hq", None)
    content = {
        "sites": {
            name: {
                "type": module._float_type.__name__,
                "shape": list(module.weight_shape),
                "bits": module.bits.to_json(),
            }
            for name, module in packed.items()
        },
        "tied": tied,
        "constants": constants,
        "architecture": adapters.describe(model),
        "report": compact(result) if isinstance(result, Result) else None,
    }
    return write_directory(directory, FORMAT, VERSION, content, written, overwrite=overwrite)


def _constant(tensor: Tensor) -> float | int | None:
    """Returns the one value of a tensor of equal, finite elements, else None."""
    if not tensor.numel() or str(tensor.dtype).removeprefix("torch.") not in _CONSTANT_DTYPES:
        return None
    value = tensor.reshape(-1)[0]
    if not bool((tensor == value).all()) or not math.isfinite(value.item()):
        return None
    if value.item() == 0 and tensor.is_floating_point() and bool(tensor.signbit().any()):
        return None  # -0.0 equals 0.0, but its bits do not
    number: float | int = value.item()
    return number


def _read(directory: str | Path) -> dict[str, Any]:
    """Reads the JSON part of a saved model."""
    if _is_pretrained(directory):
        raise ArtifactError(
            f"{directory} holds what save_pretrained wrote: load it by from_pretrained of its class, after "
            "import hq_plugin."
        )
    return read_json(directory, FORMAT, VERSION)


def _is_pretrained(directory: str | Path) -> bool:
    """Whether a directory holds what `save_pretrained` wrote, of a quantized model or of a float one."""
    folder = Path(directory).expanduser()
    return (folder / "config.json").is_file() and not (folder / JSON_FILE).exists()


def read_info(directory: str | Path) -> SavedModel:
    """Reads what a saved model is, without its tensors.

    Raises:
        ArtifactError: The directory holds no saved model, or a damaged or newer one.
    """
    return _info(directory, _read(directory))


def _info(directory: str | Path, data: dict[str, Any]) -> SavedModel:
    """Returns what a saved model's JSON says."""
    with clean_errors(directory):
        sites = []
        policy = HybridPolicy.from_json({name: site["bits"] for name, site in data["sites"].items()})
        for name, bits in policy.items():
            shape = tuple(data["sites"][name]["shape"])
            if not all(type(size) is int and 0 < size < 1 << 48 for size in shape):
                raise TypeError(f"the shape of {name} is {shape}")
            size = weight_bytes(shape, bits)
            sites.append(SavedSite(name, str(data["sites"][name]["type"]), shape, bits, size))
        architecture = data["architecture"]
        if architecture is not None and not isinstance(architecture, dict):
            raise TypeError("architecture")
        report = data["report"]
    result = None if report is None else expand(report)
    path = Path(directory).expanduser() / TENSOR_FILE
    return SavedModel(tuple(sites), architecture, result, path.stat().st_size if path.exists() else 0)


def read_result(directory: str | Path) -> Result:
    """Reads the report of a saved model, also of one that its own library saved.

    Raises:
        ArtifactError: The directory holds no saved model, or one without a report.
    """
    beside = read_beside(directory)
    if beside is None and _is_pretrained(directory):
        raise ArtifactError(
            f"{directory} holds what save_pretrained wrote, but no report ({REPORT_FILE}), which is written beside "
            "what hq_plugin.quantize made. Give the folder of such a model, or copy that file along with it."
        )
    result = beside or read_info(directory).result
    if result is None:
        raise ArtifactError(
            f"{directory} has no report: its model was converted by hand. hq_plugin.quantize and session.finetune "
            "make models that have one."
        )
    return result


def load(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Loads a packed model; its outputs equal those of the saved one bit for bit.

    Args:
        directory: What `save` wrote.
        model: A float model of the same architecture, whose weights do not matter (they may be on the meta
            device) and which is not changed. None rebuilds the architecture by its name, for models of a known
            library (timm).

    Returns:
        The packed model on the CPU, in eval mode, with `.hq` where the saved one had it.

    Raises:
        ArtifactError: The directory holds no saved model, a damaged or newer one, or one whose
            architecture must be given.
        ModelError: `model` is of another architecture.
    """
    data = _read(directory)
    info = _info(directory, data)
    if model is None and info.architecture is None:
        raise ArtifactError(
            f"{directory} does not say how to build the model's architecture. Pass a float model of the "
            "same class: hq_plugin.load(directory, model)."
        )
    skeleton = None if model is None else _without_values(adapters.skeleton(model))
    with clean_errors(directory):
        written, check = start_reading(directory, data.get("sha256"))
        try:
            if skeleton is None:
                assert info.architecture is not None
                entries = len(info.sites) + len(written) + len(data["constants"]) + len(data["tied"])
                elements = _ELEMENTS_A_BYTE * info.file_bytes + _ELEMENTS
                skeleton = adapters.rebuild(info.architecture, elements, _TENSORS_AN_ENTRY * entries)
            skeleton = _pack_sites(skeleton, info, [*written, *data["constants"], *data["tied"]])
        finally:
            check()  # before any tensor is used; what damage made of the rest matters less
        expected = state_tensors(skeleton)
        tensors = {**written, **_constants(data, expected)}
        tied = data["tied"]
        if not isinstance(tied, dict) or any(owner not in tensors for owner in tied.values()):
            raise ArtifactError(f"{directory} is damaged: a shared tensor has no owner.")
        tensors |= {name: tensors[owner] for name, owner in tied.items()}
        _check_fit(tensors, expected)
        # Float tensors take the dtype of the model. They are copied in any case, into memory that is aligned as
        # torch's is, since products may hang on it in their last bits.
        own = {
            name: tensor.to(expected[name].dtype, copy=tensor.is_floating_point())
            for name, tensor in tensors.items()
        }
        load_state(skeleton, own, assign=True)
        _tie(skeleton, tied)
        filled = [*skeleton.named_parameters(), *skeleton.named_buffers()]
        empty = [name for name, tensor in filled if tensor.is_meta]
        if empty:
            raise ArtifactError(
                f"{', '.join(empty[:5])} could not be filled: its layer loads tensors in a way of its own, or no "
                "file holds it. Pass a float model that has values: hq_plugin.load(directory, model)."
            )
    skeleton.eval().requires_grad_(False)
    if info.result is not None:
        skeleton.hq = info.result  # type: ignore[assignment]
    adapter = adapters.find(skeleton)
    return skeleton if adapter is None else adapter.finish(skeleton)


def _without_values(model: nn.Module) -> nn.Module:
    """Returns a copy of a model on the CPU whose parameters, which a file fills, are on the meta device.

    Those of modules that load them in a way of their own, and what is in no file, keep memory and values.
    """
    filled = {
        id(tensor)
        for module in model.modules()
        if type(module)._load_from_state_dict in _USUAL
        for tensor in module._parameters.values()
        if type(tensor) is nn.Parameter
    }
    empty: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
        if id(parameter) in filled
    }
    return copy.deepcopy(model, empty)._apply(lambda tensor: tensor if tensor.is_meta else tensor.cpu())


def _pack_sites(model: nn.Module, info: SavedModel, stored: Sequence[str]) -> nn.Module:
    """Puts a packed skeleton in the place of each site, wherever the model refers to it.

    Args:
        model: The float model; it may be changed.
        info: Its sites.
        stored: Names of all tensors: parameters may have become layers that were excluded, and are no sites.
    """
    if any(isinstance(module, PackedModule) for module in model.modules()):
        raise ModelError("model is quantized already. Pass the float model, before hq_plugin.quantize.")
    floats = [key.removesuffix(".weight") for key in stored if key.endswith(".weight")]
    model = with_layers_of(model, [*(site.name for site in info.sites), *floats], inplace=True)
    modules = dict(model.named_modules())
    swapped: dict[int, nn.Module] = {}
    for site in info.sites:
        module = modules.get(site.name)
        weight = None if module is None else module._parameters.get("weight")
        if module is None or weight is None or tuple(weight.shape) != site.shape:
            found = "nothing" if module is None else f"a {type(module).__name__}"
            found += "" if weight is None else f" with a weight of shape {tuple(weight.shape)}"
            raise ModelError(
                f"model is of another architecture: at {site.name!r} the saved one has a {site.type_name} with a "
                f"weight of shape {site.shape}, this one {found}."
            )
        swapped[id(module)] = PackedModule.skeleton(module, site.bits)
    return replace_modules(model, swapped)


def _constants(data: dict[str, Any], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Expands constant tensors, in the shapes of the model: what the file declares is only compared."""
    constants = data.get("constants")
    if not isinstance(constants, dict):
        raise ArtifactError("The saved model is damaged: its constants cannot be read.")
    result = {}
    for name, constant in constants.items():
        try:
            shape, dtype, value = (
                tuple(constant["shape"]),
                _CONSTANT_DTYPES[constant["dtype"]],
                constant["value"],
            )
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError("value")
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"The saved model is damaged: constant {name!r} is {constant!r}.") from error
        if name not in expected or tuple(expected[name].shape) != shape:
            raise ModelError(f"model is of another architecture: the saved one has {name!r} of shape {shape}.")
        result[name] = torch.full(shape, value, dtype=dtype)
    return result


def _check_fit(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    wrong = [
        f"{name} ({tensors[name].dtype} {tuple(tensors[name].shape)}, not {value.dtype} {tuple(value.shape)})"
        for name, value in expected.items()
        if name in tensors
        and (tensors[name].shape != value.shape or tensors[name].dtype != value.dtype)
        and not (value.is_floating_point() and tensors[name].shape == value.shape)
    ]
    for what, names in (("lacks", missing), ("has no place for", unknown), ("has otherwise", wrong)):
        if names:
            subject = "the saved model" if what == "lacks" else "this one"
            raise ModelError(
                f"model is of another architecture: {subject} {what} {', '.join(names[:5])}"
                f"{' ...' if len(names) > 5 else ''}."
            )


def _tie(model: nn.Module, tied: dict[str, str]) -> None:
    """Makes names that shared a tensor share it again."""
    for name, owner in tied.items():
        *path, last = name.rsplit(".", 1)
        *owner_path, owner_last = owner.rsplit(".", 1)
        holder = model.get_submodule(path[0] if path else "")
        source = model.get_submodule(owner_path[0] if owner_path else "")
        for field in ("_parameters", "_buffers"):
            if last in getattr(holder, field) and owner_last in getattr(source, field):
                getattr(holder, field)[last] = getattr(source, field)[owner_last]


__all__ = ["SavedModel", "SavedSite", "load", "read_info", "read_result", "save"]
