"""Finds the name and the arguments with which a timm model can be built again.

timm does not keep the arguments that a model was created with. Those that can be read off a model
(classes, input channels, image size, pooling) are recovered; `create_model` of this integration keeps
any other on the model. Nothing is guessed: a candidate is built without memory on the meta device, and
counts only if it has the same layers with the same settings and tensors of the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import timm
import torch
from torch import nn

from hq_plugin.nn import INPUT_BUFFERS, WEIGHT_BUFFERS, PackedModule, float_type

#: Attribute in which `create_model` keeps the arguments that timm forgets.
ARGUMENTS = "hq_timm_arguments"
#: Entries of `pretrained_cfg` that say how images become inputs.
PREPROCESSING = (
    "input_size",
    "test_input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "test_crop_pct",
    "crop_mode",
    "mean",
    "std",
)
#: Settings that change training, memory or the choice of a kernel, never what a model computes in eval mode.
_INDIFFERENT = frozenset(
    {
        "training",
        "inplace",
        "p",
        "drop_prob",
        "drop_path",
        "drop_block",
        "scale_by_keep",
        "drop_rate",
        "momentum",
        "grad_checkpointing",
        "fused_attn",
        "weight_init_mode",
        "fix_init",
    }
)
#: Layers that do nothing in eval mode, so that it does not matter whether a model has them.
_IDLE = frozenset({"Identity", "Dropout", "DropPath", "DropBlock2d"})

Structure = dict[str, tuple[str, dict[str, Any]]]


def pretrained_cfg(model: nn.Module) -> Any:
    """Returns the model's pretrained configuration as a dict, or whatever else stands in its place."""
    config: Any = getattr(model, "pretrained_cfg", None)
    return config.to_dict() if hasattr(config, "to_dict") else config


def find_arguments(model: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Returns the timm name and the arguments that build the architecture of a float or packed model.

    The name has no tag where the architecture does not depend on it, so that it outlives a tag.
    """
    config = pretrained_cfg(model)
    architecture, tag = config.get("architecture"), config.get("tag")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        return None
    shapes, structure = _shapes(model), _structure(model)
    names = [architecture, f"{architecture}.{tag}"] if tag else [architecture]
    for name in names:
        for start in _starts(model):
            arguments = start
            # A second round adds what the first rebuilt model was seen to have otherwise.
            for _ in range(2):
                rebuilt = _build(name, arguments)
                if rebuilt is None:
                    break
                if _shapes(rebuilt) == shapes and _matches(structure, _structure(rebuilt)):
                    return name, arguments
                seen, wanted = _readable(rebuilt), _readable(model)
                arguments = {**arguments, **{k: v for k, v in wanted.items() if seen.get(k) != v}}
    return None


def input_channels(model: nn.Module) -> int | None:
    """Returns the channels that the model takes, where it can be read off it."""
    channels = getattr(model, "in_chans", None)
    if isinstance(channels, int):
        return channels
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)


def image_size(model: nn.Module) -> tuple[int, int] | None:
    """Returns height and width of the images that the model takes, where it was built for one size."""
    for holder in (getattr(model, "patch_embed", None), model):
        size = getattr(holder, "img_size", None)
        if isinstance(size, (tuple, list)) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None


def _build(name: str, arguments: dict[str, Any]) -> nn.Module | None:
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **arguments)
    except Exception:  # An argument that this architecture does not take; timm's models raise anything.
        return None


def _starts(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yields arguments to start from, the most certain first."""
    remembered = getattr(model, ARGUMENTS, None)
    if isinstance(remembered, dict):
        yield dict(remembered)
    arguments: dict[str, Any] = {}
    if isinstance(getattr(model, "num_classes", None), int):
        arguments["num_classes"] = model.num_classes
    channels = input_channels(model)
    if channels is not None:
        arguments["in_chans"] = channels
    if isinstance(remembered, dict):
        yield {**remembered, **arguments}
    yield arguments


def _readable(model: nn.Module) -> dict[str, Any]:
    """Returns further arguments that can be read off a model; not every architecture takes them."""
    found: dict[str, Any] = {}
    size = image_size(model)
    if size is not None:
        found["img_size"] = list(size)
    pool = getattr(model, "global_pool", None)
    if isinstance(pool, nn.Module) or pool is None:
        holder = pool if pool is not None else getattr(getattr(model, "head", None), "global_pool", None)
        pool = getattr(holder, "pool_type", None)
    if isinstance(pool, str):
        found["global_pool"] = pool
    if isinstance(getattr(model, "dynamic_img_size", None), bool):
        found["dynamic_img_size"] = model.dynamic_img_size
    return found


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of the float model, also for one that is packed."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            prefix = f"{name}." if name else ""
            for buffer in (*WEIGHT_BUFFERS, *INPUT_BUFFERS):
                shapes.pop(prefix + buffer, None)
            shapes[prefix + "weight"] = module.weight_shape
    return shapes


def _structure(model: nn.Module) -> Structure:
    """Returns the class and the plain settings of every layer."""
    structure = {}
    for name, module in model.named_modules():
        kind = float_type(module)
        if kind.__name__ in _IDLE:
            continue
        settings = {
            key: _plain(value)
            for key, value in vars(module).items()
            if not key.startswith("_") and key not in _INDIFFERENT and _is_plain(value)
        }
        structure[name] = (f"{kind.__module__}.{kind.__qualname__}", settings)
    return structure


def _matches(model: Structure, rebuilt: Structure) -> bool:
    """Compares what the rebuilt model has; a model may carry attributes beyond those."""
    if model.keys() != rebuilt.keys():
        return False
    missing = object()
    return all(
        kind == model[name][0] and all(model[name][1].get(key, missing) == value for key, value in settings.items())
        for name, (kind, settings) in rebuilt.items()
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str, Enum))


def _plain(value: Any) -> Any:
    # A JSON round trip turns tuples into lists; the two mean the same to a layer.
    return tuple(_plain(part) for part in value) if isinstance(value, (tuple, list)) else value
