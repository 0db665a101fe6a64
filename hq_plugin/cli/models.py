"""Models by reference: float ones by name, folder or function; saved ones by directory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hq_plugin.cli.references import call, integration, named_values
from hq_plugin.errors import ArtifactPathError, ConfigError, HQWarning, ModelError

if TYPE_CHECKING:
    from hq_plugin.config import Config


@dataclass(frozen=True)
class Source:
    """A model and what came with it.

    Attributes:
        model: The model.
        processor: Tokenizer or image processor of a Hugging Face folder, or None.
        random: Whether its weights are known to be random.
    """

    model: Any
    processor: Any = None
    random: bool = False

    @property
    def adapter(self) -> Any:
        """The adapter of the model's library, or None."""
        from hq_plugin import adapters

        return adapters.find(self.model)

    @property
    def is_hugging_face(self) -> bool:
        """Whether the model is one of transformers'."""
        return self.adapter is not None and self.adapter.name == "huggingface"

    def config(self) -> Config:
        """Returns the options that fit the model, for measuring it: on the user's text alone."""
        from hq_plugin.config import Config

        config = Config(processor=self.processor, self_written=0.0)
        return config.filled(None if self.adapter is None else self.adapter.options(self.model, config))

    def batches(self, data: Any) -> Any:
        """Returns data as batches or a Dataset of what the model takes."""
        return data if self.adapter is None else self.adapter.batches(self.model, data, self.config())


def load_model(
    reference: str,
    arguments: Sequence[str] | None = None,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    seed: int | None = None,
) -> Source:
    """Returns a float model.

    Args:
        reference: What `options.MODEL` describes.
        arguments: Arguments for it, each `name=value`.
        checkpoint: A file with its weights, as `read_checkpoint` takes it.
        pretrained: Whether timm may download weights.
        seed: Seeds weights that are initialised at random, so that several processes begin with the same.

    Raises:
        ConfigError: The reference or an argument cannot be understood.
        ModelError: There is no such model, or the weights do not fit it.
    """
    import torch

    torch.manual_seed(seed or 0)
    source = _find_model(reference, named_values("--model-arg", arguments), pretrained)
    if not isinstance(source.model, torch.nn.Module):
        raise ConfigError(f"model {reference!r} returned a {type(source.model).__name__}, not a torch.nn.Module.")
    if checkpoint is not None:
        _load_weights(source.model, reference, checkpoint)
        return replace(source, random=False)
    return source


def load_trained_model(
    reference: str,
    arguments: Sequence[str] | None,
    checkpoint: Path | None,
    pretrained: bool,
    seed: int | None,
) -> Source:
    """Returns a float model as `load_model` does, with a warning if nobody gave weights for it."""
    source = load_model(reference, arguments, checkpoint, pretrained, seed)
    if source.random:
        warnings.warn(
            f"{reference!r} has random weights. Give --checkpoint FILE, or --pretrained to download them.",
            HQWarning,
            stacklevel=2,
        )
    return source


def _load_weights(model: Any, reference: str, checkpoint: Path) -> None:
    weights = read_checkpoint(checkpoint)
    own = model.state_dict()
    missing, foreign = [name for name in own if name not in weights], [name for name in weights if name not in own]
    if missing or foreign:
        raise ModelError(
            f"{checkpoint} does not fit {reference!r}: {_some(missing)} of the model's tensors are not in it, and "
            f"{_some(foreign)} of its tensors are not in the model. Names must agree: write the file with "
            "safetensors.torch.save_file({n: t.clone() for n, t in model.state_dict().items()}, FILE) from this "
            "very model."
        )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        told = str(error).strip().splitlines()
        raise ModelError(f"{checkpoint} does not fit {reference!r}: {(told[1:] or told)[0].strip()}") from error


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})" if names else "none"


#: How files of torch.save begin, new and old: a zip archive, and a pickle.
_PICKLES = (b"PK", b"\x80")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads float weights from a .safetensors file.

    Raises:
        ModelError: It is none. What torch.save wrote is a pickle, of which nothing is read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, ValueError) as error:
        with path.open("rb") as file:
            pickled = file.read(2).startswith(_PICKLES)
        if pickled:
            raise ModelError(
                f"{path} is a pickle, which can hold code; hq_plugin reads none. If you trust it, write it anew: "
                'python -c "import torch, safetensors.torch as s; '
                f"s.save_file(torch.load('{path}', weights_only=True), '{path.with_suffix('.safetensors')}')\""
            ) from error
        told = str(error).partition("\n")[0] or "it is empty"
        raise ModelError(f"{path} cannot be read: {told}. Give a .safetensors file.") from error


def source_arguments(
    reference: str,
    data: str | None,
    checkpoint: Path | None,
    arguments: Sequence[str] | None,
    pretrained: bool,
    seed: int | None,
) -> tuple[str, ...]:
    """Returns the arguments that give a float model and its data again, for commands that a user is shown."""
    named = [
        ("--checkpoint", checkpoint),
        *(("--model-arg", argument) for argument in arguments or ()),
        ("--data", data),
        ("--seed", seed),
    ]
    given = [text for flag, value in named if value is not None for text in (flag, str(value))]
    return (reference, *(["--pretrained"] if pretrained else []), *given)


def _find_model(reference: str, arguments: dict[str, Any], pretrained: bool) -> Source:
    from hq_plugin.storage import JSON_FILE

    name = reference.removeprefix("timm:")
    folder = Path(reference).is_dir() and not reference.startswith("timm:")
    if pretrained and (folder or ":" in name):
        raise ConfigError(f"--pretrained is for timm models; {reference!r} brings its weights itself.")
    if folder and (Path(reference) / JSON_FILE).is_file():
        raise ModelError(f"{reference!r} holds what hq_plugin saved. Give the float model that it was made from.")
    if folder or reference.startswith("hf:"):
        library = integration("huggingface.folder", f"{reference!r} is a Hugging Face model")
        return Source(*library.read_folder(reference.removeprefix("hf:"), **arguments))
    if ":" in name:
        return Source(call(name, "model", arguments))
    if "/" in name:
        raise ConfigError(f"model {reference!r} is no folder. A model of the Hugging Face hub is hf:{name}.")
    package, _, inside = name.partition(".")
    if package not in ("", "timm") and inside and find_spec(package):
        raise ConfigError(f"model {reference!r} looks like a function in a module: write module:function.")
    library = integration("timm", f"{reference!r} is a timm name")
    return Source(library.create_model(name, pretrained=pretrained, **arguments), random=not pretrained)


def load_saved(directory: Path, skeleton: str | None = None, arguments: Sequence[str] | None = None) -> Source:
    """Returns a saved model.

    Args:
        directory: What `hq_plugin.save`, or `save_pretrained` of a quantized model, wrote.
        skeleton: The float model, as `options.MODEL` describes, where the directory does not tell.
        arguments: Arguments for it.

    Raises:
        ArtifactError: The directory holds neither.
        ConfigError: The float model cannot be found, or is needed and was not given.
    """
    import hq_plugin
    from hq_plugin.artifact import read_info

    if is_pretrained(directory):
        library = integration("huggingface.folder", f"{directory} holds a Hugging Face model")
        own_class = None if skeleton is None else type(load_model(skeleton, arguments).model)
        return Source(*library.read_folder(directory, own_class))
    if skeleton is None and read_info(directory).architecture is None:
        raise ConfigError(
            f"{directory} does not say how to build its model. Give the float one as it was quantized: "
            "--model module:function."
        )
    return Source(hq_plugin.load(directory, None if skeleton is None else load_model(skeleton, arguments).model))


def example_inputs(source: Source, data: Any) -> Any:
    """Returns inputs of one forward as a tuple or dict: of the data, or what the model's library proposes.

    Raises:
        ConfigError: Nobody knows what they look like.
    """
    from hq_plugin.data import prepare_data

    if data is not None:
        batch = prepare_data(source.batches(data), source.model, source.config()).holdout[0]
        return batch.kwargs or batch.args
    if source.adapter is None:
        raise ConfigError("Example inputs are needed: give --data.")
    args, kwargs = source.adapter.example_inputs(source.model)
    return kwargs or args


def is_pretrained(directory: Path) -> bool:
    """Whether a directory holds what `save_pretrained` of a quantized model wrote."""
    from hq_plugin.storage import JSON_LIMIT
    from hq_plugin.untrusted import read_file

    try:
        config = json.loads(read_file(directory / "config.json", JSON_LIMIT))
        return bool(config["quantization_config"]["quant_method"] == "hq")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_out(out: Path, overwrite: bool, kind: str, pretrained: bool | None = None) -> None:
    """Finds out before the work, not after it, that a result would have no place.

    Args:
        out: The directory.
        overwrite: Whether one of this kind may be replaced.
        kind: `"model"` or `"session"`.
        pretrained: Whether `save_pretrained` is to write it; None while that is not known.

    Raises:
        ArtifactPathError: It holds something, or cannot be written.
    """
    from hq_plugin.storage import check_place, check_target

    check_place(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    replaces_pretrained = kind == "model" and pretrained is not False and is_pretrained(out)
    if pretrained and not replaces_pretrained:
        raise ArtifactPathError(f"{out} holds something else, which is not deleted. Choose a new directory.")
    if not replaces_pretrained:
        check_target(out, f"hq_plugin {kind}", overwrite=True)
    if not overwrite:
        raise ArtifactPathError(f"{out} holds a saved {kind}. Give --overwrite or another directory.")


def save_model(packed: Any, processor: Any, out: Path, overwrite: bool) -> None:
    """Saves a quantized model: one of Hugging Face as its `save_pretrained` does, any other by `hq_plugin.save`."""
    import hq_plugin

    if Source(packed).is_hugging_face:
        library = integration("huggingface.folder", "The model is of Hugging Face")
        library.write_folder(packed, processor, out)
    else:
        hq_plugin.save(packed, out, overwrite=overwrite)
