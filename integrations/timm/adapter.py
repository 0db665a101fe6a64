"""What hq_plugin asks of timm: input shapes, and rebuilding an architecture by its name.

Public helpers for users (`create_model`, `load`, `data_config`, `transform`) live here as well. How the
arguments that timm forgets are found again is in `architecture.py`.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import hq_plugin
from hq_plugin.adapters import Unwrapped, without_memory
from hq_plugin.config import Config
from hq_plugin.errors import ArtifactError, ModelError
from hq_plugin.integrations.timm.architecture import (
    ARGUMENTS,
    PREPROCESSING,
    find_arguments,
    image_size,
    input_channels,
    pretrained_cfg,
)

#: Arguments of `timm.create_model` that fetch or load something: neither remembered nor obeyed.
_REFUSED = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "checkpoint_path",
    "cache_dir",
)


class TimmAdapter:
    """The adapter of `hq_plugin.adapters`."""

    name = "timm"

    def matches(self, model: nn.Module) -> bool:
        """Returns whether the model is timm's: it carries a pretrained configuration."""
        return isinstance(pretrained_cfg(model), dict)

    def unwrap(self, model: Any) -> Unwrapped | None:
        """Returns None: timm wraps nothing around its models."""
        return None

    def options(self, model: nn.Module, config: Config) -> dict[str, Any]:
        """Returns nothing: the general options fit timm's models."""
        return {}

    def fused(self, model: nn.Module) -> list[list[str]]:
        """Returns nothing: timm's attention has one `qkv` layer already."""
        return []

    def batches(self, model: nn.Module, data: Any, config: Config) -> Any:
        """Returns the data as it is."""
        return data

    def example_inputs(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns a batch of two normally distributed images of the model's input size."""
        parameter = next(model.parameters())
        shape = (2, *data_config(model)["input_size"])
        return (torch.randn(shape, dtype=parameter.dtype, device=parameter.device),), {}

    def describe(self, model: nn.Module) -> dict[str, Any] | None:
        """Returns name, arguments and preprocessing that rebuild the model, or None if none found do.

        What is returned was tried: the rebuilt model has the same layers with the same settings, and
        tensors of the same shapes.
        """
        found = find_arguments(model)
        if found is None:
            return None
        name, arguments = found
        config = pretrained_cfg(model)
        # With what is None: the default of a name may have a size to test with where this one has none.
        preprocessing = {key: config.get(key) for key in PREPROCESSING}
        description = {"name": name, "arguments": arguments, "preprocessing": preprocessing}
        return json.loads(json.dumps(description)) if _is_json(description) else None

    def rebuild(self, description: dict[str, Any]) -> nn.Module:
        """Builds the architecture, its parameters on the meta device.

        Raises:
            ArtifactError: timm has no such model, or not with these arguments.
        """
        name, arguments = description.get("name"), description.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, dict) or not timm.is_model(name):
            raise ArtifactError(
                f"timm {timm.__version__} has no model {name!r}. Upgrade timm, or pass a float model: "
                "hq_plugin.load(directory, model)."
            )
        refused = sorted(set(arguments) & set(_REFUSED))
        if refused:
            raise ArtifactError(f"The saved architecture asks for {', '.join(refused)}, which no saved model does.")
        try:
            model = without_memory(lambda: create_model(name, **arguments))
        except ModelError as error:
            raise ArtifactError(f"The saved model cannot be rebuilt: {error}") from error
        _set_preprocessing(model, description.get("preprocessing", {}))
        return model

    def skeleton(self, model: nn.Module) -> nn.Module:
        """Returns the model: timm's layers are what they are called."""
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        """Returns the model as it is."""
        return model


ADAPTER = TimmAdapter()


def create_model(name: str, **arguments: Any) -> nn.Module:
    """As `timm.create_model`, but the model remembers its arguments, so that `load` can rebuild it.

    Only needed for arguments that cannot be read off a model, such as `embed_dim` or `block_size`.

    Args:
        name: A timm model.
        **arguments: Arguments of `timm.create_model`; those that are no JSON values are not remembered.

    Raises:
        ModelError: timm has no such model, or not with these arguments.
    """
    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:5] or get_close_matches(name, timm.list_models(), 5)
        close = ", ".join(close) or "see timm.list_models()"
        raise ModelError(f"timm {timm.__version__} has no model {name!r}. Close to it: {close}.")
    try:
        model = timm.create_model(name, **arguments)
    except Exception as error:  # timm's models raise anything for arguments that they do not take.
        raise ModelError(f"timm cannot build {name!r} with {arguments}: {error}") from error
    kept = {key: value for key, value in arguments.items() if key not in _REFUSED and _is_json(value)}
    setattr(model, ARGUMENTS, json.loads(json.dumps(kept)))
    return model


def data_config(model: nn.Module) -> dict[str, Any]:
    """Returns `input_size` (channels, height, width), `mean`, `std` and `interpolation` of a model.

    They come from its `pretrained_cfg`; the input channels and, where the model knows it, the image size
    are those with which it was really built.

    Args:
        model: A timm model, float or quantized.

    Raises:
        ModelError: The model is not timm's.
    """
    if not ADAPTER.matches(model):
        raise ModelError(f"{type(model).__name__} is not a timm model: it has no pretrained_cfg.")
    config = timm.data.resolve_model_data_config(model)
    channels = input_channels(model) or config["input_size"][0]
    if channels != len(config["mean"]):
        config["mean"] = (sum(config["mean"]) / len(config["mean"]),) * channels
        config["std"] = (sum(config["std"]) / len(config["std"]),) * channels
    config["input_size"] = (channels, *(image_size(model) or config["input_size"][1:]))
    return config


def transform(model: nn.Module, *, training: bool = False) -> Any:
    """Returns the image transform (PIL image to tensor) with which the model was trained or evaluated.

    Args:
        model: A timm model, float or quantized.
        training: Whether to return the one of training, with its augmentation.

    Raises:
        ModelError: The model is not timm's.
    """
    return timm.data.create_transform(**data_config(model), is_training=training)


def load(directory: str | Path) -> nn.Module:
    """Loads a saved timm model from its name alone; importing timm is all that it needs.

    Args:
        directory: What `hq_plugin.save` wrote.

    Returns:
        The packed model, in eval mode.

    Raises:
        ArtifactError: The directory holds no saved timm model, or a damaged one.
    """
    return hq_plugin.load(directory)


def _set_preprocessing(model: nn.Module, preprocessing: Any) -> None:
    """Gives a rebuilt model the preprocessing of the saved one, which may differ from timm's default."""
    if not isinstance(preprocessing, dict) or not set(preprocessing) <= set(PREPROCESSING):
        raise ArtifactError(f"The saved model is damaged: its preprocessing is {preprocessing!r}.")
    restored = {key: tuple(v) if isinstance(v, list) else v for key, v in preprocessing.items()}
    config: Any = {**pretrained_cfg(model), **restored}
    # timm reads the first; the second is its older name for the same dict.
    model.pretrained_cfg = model.default_cfg = config


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
