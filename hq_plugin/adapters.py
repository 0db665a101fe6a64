"""The one door between the core and the libraries that models come from.

An adapter lives in `hq_plugin.integrations.<name>` and is imported only if its library already is: a
timm model cannot exist before timm was imported. The core itself imports none of them.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Protocol

from torch import nn

from hq_plugin.errors import ArtifactError

#: Integration to the library that makes its models. A saved file can name these and nothing else.
KNOWN = {"timm": "timm"}


class Adapter(Protocol):
    """What an integration's `ADAPTER` offers."""

    #: Name of the integration, a key of `KNOWN`.
    name: str

    def matches(self, model: nn.Module) -> bool:
        """Returns whether the model comes from this library."""

    def example_inputs(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns positional and keyword inputs of the right shapes, for two samples."""

    def describe(self, model: nn.Module) -> dict[str, Any] | None:
        """Returns what `rebuild` needs, as JSON values, or None where a name is not enough."""

    def rebuild(self, description: dict[str, Any]) -> nn.Module:
        """Builds the float architecture, randomly initialised, without any download."""


def find(model: nn.Module) -> Adapter | None:
    """Returns the adapter of a model's library, or None."""
    for name, library in KNOWN.items():
        if library in sys.modules:
            adapter = _adapter(name)
            if adapter.matches(model):
                return adapter
    return None


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Returns how to rebuild a model's architecture, as JSON values, or None where nobody knows."""
    adapter = find(model)
    description = None if adapter is None else adapter.describe(model)
    return None if adapter is None or description is None else {"integration": adapter.name, **description}


def rebuild(description: dict[str, Any]) -> nn.Module:
    """Builds the float architecture that `describe` told of.

    Raises:
        ArtifactError: The description is not one of ours, or its library is not installed.
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
    return adapter.rebuild({key: value for key, value in description.items() if key != "integration"})


def _adapter(name: str) -> Adapter:
    adapter: Adapter = importlib.import_module(f"hq_plugin.integrations.{name}").ADAPTER
    return adapter
