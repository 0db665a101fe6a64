"""The one door between the core and the libraries that models come from.

An adapter lives in `hq_plugin.integrations.<name>` and is imported only if its library already is: a
timm model cannot exist before timm was imported. The core itself imports none of them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import nn

from hq_plugin.config import Config
from hq_plugin.errors import ArtifactError
from hq_plugin.seeding import seeded
from hq_plugin.untrusted import build_at_most

#: Integration to the library that makes its models. A saved file can name these and nothing else.
KNOWN = {"timm": "timm", "huggingface": "transformers"}
#: What holds a model under `module`.
_HOLDERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class Adapter(Protocol):
    """What an integration's `ADAPTER` offers."""

    #: Name of the integration, a key of `KNOWN`.
    name: str

    def matches(self, model: nn.Module) -> bool:
        """Returns whether the model comes from this library."""

    def unwrap(self, model: Any) -> Unwrapped | None:
        """Takes a model out of one of the library's own objects, or returns None for one it does not know."""

    def options(self, model: nn.Module, config: Config) -> dict[str, Any]:
        """Returns values for options of `Config` that the user left at None."""

    def fused(self, model: nn.Module) -> list[list[str]]:
        """Returns names of layers that kernels fuse and that therefore share their widths."""

    def batches(self, model: nn.Module, data: Any, config: Config) -> Any:
        """Turns data of the library's own kinds (text, pictures) into batches or a Dataset.

        What it does not know is returned as it is; None stays None where nothing can be made up.
        """

    def example_inputs(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns positional and keyword inputs of the right shapes, for two samples."""

    def describe(self, model: nn.Module) -> dict[str, Any] | None:
        """Returns what `rebuild` needs, as JSON values, or None where a name is not enough."""

    def rebuild(self, description: dict[str, Any]) -> nn.Module:
        """Builds the float architecture without any download; its parameters need no values and no memory."""

    def skeleton(self, model: nn.Module) -> nn.Module:
        """Returns a float model, which is not changed, with the layers that its quantized form has.

        Its parameters need no values.
        """

    def finish(self, model: nn.Module) -> nn.Module:
        """Gives a packed model what its library expects of one."""


@dataclass(frozen=True)
class Unwrapped:
    """A model inside something else, such as a transformers pipeline.

    Attributes:
        model: The model.
        processor: Tokenizer or image processor that came with it, or None.
        wrap: Puts another model into a copy of what it came in.
    """

    model: Any
    processor: Any
    wrap: Callable[[nn.Module], Any]


def opened(model: Any) -> Any:
    """Returns the module inside what may wrap one: a pipeline, torch.compile, data parallelism."""
    model = _unheld(model)
    inside = getattr(model, "model", None)
    return inside if not isinstance(model, nn.Module) and isinstance(inside, nn.Module) else model


def _unheld(model: Any) -> Any:
    while isinstance(model, _HOLDERS) or type(model).__name__ == "OptimizedModule":
        model = model.module if isinstance(model, _HOLDERS) else model._orig_mod  # torch.compile's
    return model


def unwrap(model: Any) -> Unwrapped:
    """Takes a model out of what a library wraps around it; a bare model comes back, ready to be quantized.

    Out of torch.compile and data parallelism it stays: compile or wrap the result anew.

    Raises:
        ModelError: The library knows that the model cannot be quantized.
    """
    model = _unheld(model)
    if not isinstance(model, nn.Module):
        found = next((o for o in (adapter.unwrap(model) for adapter in _imported()) if o is not None), None)
        return found or Unwrapped(model, None, lambda packed: packed)
    adapter = find(model)
    found = None if adapter is None else adapter.unwrap(model)
    return found or Unwrapped(model, None, lambda packed: packed)


def skeleton(model: Any) -> Any:
    """Takes a float model out of what wraps it, with the layers that its quantized form has.

    Unlike for `unwrap` its parameters need no values, and it need not be one that can be quantized.
    """
    model = opened(model)
    adapter = find(model) if isinstance(model, nn.Module) else None
    return model if adapter is None else adapter.skeleton(model)


def find(model: nn.Module) -> Adapter | None:
    """Returns the adapter of a model's library, or None."""
    return next((adapter for adapter in _imported() if adapter.matches(model)), None)


def _imported() -> Iterator[Adapter]:
    """Yields the adapters of the libraries that are imported, and that ours fit."""
    for name, library in KNOWN.items():
        if library in sys.modules:
            try:
                adapter = _adapter(name)
            except ImportError:
                continue  # another version of the library; its models are like any other
            yield adapter


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Returns how to rebuild a model's architecture, as JSON values, or None where nobody knows."""
    adapter = find(model)
    description = None if adapter is None else adapter.describe(model)
    return None if adapter is None or description is None else {"integration": adapter.name, **description}


def rebuild(description: dict[str, Any], elements: int, tensors: int) -> nn.Module:
    """Builds the float architecture that `describe` told of; its parameters are to be filled.

    Args:
        description: Read from a file.
        elements: Most elements that the model may have.
        tensors: Most tensors.

    Raises:
        ArtifactError: The description is not one of ours, asks for a larger model, or its library is not installed.
    """
    name = description.get("integration")
    if name not in KNOWN:
        raise ArtifactError(
            f"The saved architecture comes from {name!r}; this hq_plugin knows {', '.join(KNOWN)}. Pass a "
            "float model: hq_plugin.load(directory, model)."
        )
    try:
        adapter = _adapter(name)
    except ImportError as error:
        raise ArtifactError(
            f"The saved model needs {KNOWN[name]}, which cannot be imported ({error}). "
            f"pip install 'hq-plugin[{name}]'."
        ) from error
    rest = {key: value for key, value in description.items() if key != "integration"}
    with seeded(0):
        return build_at_most(lambda: adapter.rebuild(rest), elements, tensors)


def without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    """Builds a model whose parameters are on the meta device, where its code allows that; buffers have values.

    Where torch's default device is the meta device, nothing has values.
    """
    if torch.get_default_device().type == "meta":
        return build()
    try:
        with init_empty_weights(include_buffers=False):
            model = build()
    except Exception:  # whatever code does that computes with its parameters while it is built
        return build()
    # Tables beside a parameter (of relative positions) may follow it to the meta device; they are in no file.
    return build() if any(buffer.is_meta for buffer in model.buffers()) else model


def _adapter(name: str) -> Adapter:
    adapter: Adapter = importlib.import_module(f"hq_plugin.integrations.{name}").ADAPTER
    return adapter
