"""What hq_plugin asks of timm: input shapes, and rebuilding an architecture by its name.

timm does not keep the arguments that a model was created with. Those that can be read off a model
(classes, input channels, image size) are recovered and checked against its tensors; `create_model` here
keeps any other on the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import hq_plugin
from hq_plugin.errors import ArtifactError, ModelError
from hq_plugin.nn import PackedModule

#: Attribute in which `create_model` keeps the arguments that timm forgets.
_ARGUMENTS = "hq_timm_arguments"


class TimmAdapter:
    """The adapter of `hq_plugin.adapters`."""

    def matches(self, model: nn.Module) -> bool:
        """Returns whether the model is timm's: it carries a pretrained configuration."""
        return isinstance(_pretrained_cfg(model), dict)

    def example_inputs(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns a batch of two normally distributed images of the model's input size."""
        parameter = next(model.parameters())
        shape = (2, *data_config(model)["input_size"])
        return (torch.randn(shape, dtype=parameter.dtype, device=parameter.device),), {}

    def describe(self, model: nn.Module) -> dict[str, Any] | None:
        """Returns name and arguments that rebuild the architecture, or None if none found do."""
        name = _pretrained_cfg(model).get("architecture")
        if not isinstance(name, str) or not timm.is_model(name):
            return None
        wanted = _shapes(model)
        for arguments in _arguments(model):
            try:
                with torch.device("meta"):
                    rebuilt = timm.create_model(name, pretrained=False, **arguments)
            except (TypeError, ValueError, RuntimeError, AssertionError, NotImplementedError):
                continue
            if _shapes(rebuilt) == wanted:
                return {"name": name, "arguments": arguments}
        return None

    def rebuild(self, description: dict[str, Any]) -> nn.Module:
        """Builds the architecture without pretrained weights.

        Raises:
            ArtifactError: timm has no such model, or not with these arguments.
        """
        name, arguments = description.get("name"), description.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, dict) or not timm.is_model(name):
            raise ArtifactError(
                f"timm {timm.__version__} has no model {name!r}. Upgrade timm, or pass a float model: "
                "hq_plugin.load(directory, model)."
            )
        if set(arguments) & {"pretrained", "checkpoint_path", "pretrained_cfg"}:
            raise ArtifactError("The saved architecture asks for pretrained weights, which no saved model does.")
        try:
            return create_model(name, **arguments)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ArtifactError(f"timm cannot build {name!r} with {arguments}: {error}") from error


ADAPTER = TimmAdapter()


def create_model(name: str, **arguments: Any) -> nn.Module:
    """As `timm.create_model`, but the model remembers its arguments, so that `load` can rebuild it.

    Only needed for arguments that cannot be read off a model, such as `embed_dim` or `block_size`.

    Args:
        name: A timm model.
        **arguments: Arguments of `timm.create_model`; those that are no JSON values are not remembered.
    """
    model = timm.create_model(name, **arguments)
    kept = {key: value for key, value in arguments.items() if key != "pretrained" and _is_json(value)}
    setattr(model, _ARGUMENTS, json.loads(json.dumps(kept)))
    return model


def data_config(model: nn.Module) -> dict[str, Any]:
    """Returns `input_size` (channels, height, width), `mean`, `std` and `interpolation` of a model.

    They come from its `pretrained_cfg`; the input channels and, where the model knows it, the image size
    are those with which it was really built.

    Raises:
        ModelError: The model is not timm's.
    """
    if not ADAPTER.matches(model):
        raise ModelError(f"{type(model).__name__} is not a timm model: it has no pretrained_cfg.")
    config = timm.data.resolve_model_data_config(model)
    channels = _input_channels(model)
    size = _image_size(model)
    if channels is not None and channels != config["input_size"][0]:
        config["mean"] = (sum(config["mean"]) / len(config["mean"]),) * channels
        config["std"] = (sum(config["std"]) / len(config["std"]),) * channels
    height_width = config["input_size"][1:] if size is None else size
    config["input_size"] = (channels or config["input_size"][0], *height_width)
    return config


def transform(model: nn.Module, *, training: bool = False) -> Any:
    """Returns the image transform (PIL image to tensor) with which the model was trained or evaluated."""
    return timm.data.create_transform(**data_config(model), is_training=training)


def load(directory: str | Path) -> nn.Module:
    """Loads a saved timm model from its name alone; importing timm is all that it needs.

    Raises:
        ArtifactError: The directory holds no saved timm model, or a damaged one.
    """
    return hq_plugin.load(directory)


def _pretrained_cfg(model: nn.Module) -> Any:
    config: Any = getattr(model, "pretrained_cfg", None)
    return config.to_dict() if hasattr(config, "to_dict") else config


def _arguments(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yields arguments to try, the most certain first."""
    remembered = getattr(model, _ARGUMENTS, None)
    if isinstance(remembered, dict):
        yield dict(remembered)
    arguments: dict[str, Any] = {}
    if isinstance(getattr(model, "num_classes", None), int):
        arguments["num_classes"] = model.num_classes
    channels = _input_channels(model)
    if channels is not None:
        arguments["in_chans"] = channels
    yield dict(arguments)
    if isinstance(remembered, dict):
        yield {**remembered, **arguments}
    size = _image_size(model)
    if size is not None:
        yield {**arguments, "img_size": list(size)}


def _input_channels(model: nn.Module) -> int | None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return None


def _image_size(model: nn.Module) -> tuple[int, int] | None:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(size, (tuple, list)) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of the float model, also for one that is packed."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            prefix = f"{name}." if name else ""
            for buffer in ("weight_packed", "weight_step", "activation_step", "activation_zero_point"):
                shapes.pop(prefix + buffer, None)
            shapes[prefix + "weight"] = module.weight_shape
    return shapes


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
