"""Models by reference: float ones by name or function, saved ones by directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hq_plugin.cli.data import load_data
from hq_plugin.cli.references import call, timm
from hq_plugin.errors import ConfigError, ModelError


def load_model(
    reference: str, texts: Sequence[str] | None = None, checkpoint: Path | None = None, pretrained: bool = False
) -> Any:
    """Returns a float model.

    Args:
        reference: What `options.MODEL` describes.
        texts: Arguments for it, each `name=value`.
        checkpoint: A .safetensors file with its weights.
        pretrained: Whether timm may download weights.

    Raises:
        ConfigError: The reference or an argument cannot be understood.
        ModelError: There is no such model, or the weights do not fit it.
    """
    arguments = _arguments(texts or ())
    name = reference.removeprefix("timm:")
    if ":" in name:
        if pretrained:
            raise ConfigError(f"--pretrained is for timm models; {reference!r} loads its weights itself.")
        model = call(name, "model", arguments)
    else:
        model = timm(f"{reference!r} is a timm name").create_model(name, pretrained=pretrained, **arguments)
    if checkpoint is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            model.load_state_dict(load_file(checkpoint))
        except (SafetensorError, RuntimeError) as error:
            raise ModelError(f"{checkpoint} does not fit {reference!r}: {error}") from error
    return model


def load_saved(
    directory: Path, model: str | None, texts: Sequence[str] | None, data: str | None
) -> tuple[Any, Any]:
    """Returns a saved model, and example inputs for it as a tuple or dict.

    Raises:
        ConfigError: Nobody knows what its inputs look like.
    """
    import hq_plugin
    from hq_plugin import adapters
    from hq_plugin.data import prepare_data

    skeleton = None if model is None else load_model(model, texts)
    loaded = hq_plugin.load(directory, skeleton)
    if data is not None:
        batch = prepare_data(load_data(data, loaded, test=True), loaded, hq_plugin.Config().filled()).holdout[0]
        return loaded, batch.kwargs or batch.args
    adapter = adapters.find(loaded)
    if adapter is None:
        raise ConfigError("Example inputs are needed: give --data.")
    args, kwargs = adapter.example_inputs(loaded)
    return loaded, kwargs or args


def _arguments(texts: Sequence[str]) -> dict[str, Any]:
    arguments = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--model-arg {text!r} is not name=value.")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments
