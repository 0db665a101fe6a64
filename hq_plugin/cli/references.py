"""What a user wrote, made into Python: `module:function`, `name=value`, `2,3,4`, integrations by name."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from hq_plugin.errors import ConfigError

#: Integration to what a user installs for it.
_EXTRAS = {"timm": "timm", "huggingface": "transformers"}


def call(reference: str, what: str, arguments: dict[str, Any]) -> Any:
    """Calls `module:function`; the current directory is importable, as for `python -m`.

    Raises:
        ConfigError: There is no such function.
    """
    module_name, _, function_name = reference.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{what} {reference!r} cannot be imported: {error}. Write module:function.") from error
    if not callable(function):
        raise ConfigError(f"{what} {reference!r} is a {type(function).__name__}, not a function.")
    return function(**arguments)


def integration(name: str, reason: str) -> Any:
    """Imports an integration, which only some references need.

    Args:
        name: A module under `hq_plugin.integrations`.
        reason: Why it is needed, for the error.

    Raises:
        ConfigError: Its library is not installed.
    """
    try:
        module = importlib.import_module(f"hq_plugin.integrations.{name}")
        if name.startswith("huggingface") and not sys.stderr.isatty():
            # Its bars are drawn anew a hundred times, each on a line of its own in a file.
            importlib.import_module("transformers.utils.logging").disable_progress_bar()
        return module
    except ImportError as error:
        extra = _EXTRAS[name.partition(".")[0]]
        raise ConfigError(
            f"{reason}, and {extra} is missing ({error}): pip install 'hq-plugin[{extra}]'"
        ) from error


def named_values(flag: str, texts: Sequence[str] | None) -> dict[str, Any]:
    """Reads `name=value` pairs, each value as JSON if it is JSON, else as text.

    Raises:
        ConfigError: One is no such pair.
    """
    values: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"{flag} {text!r} is not name=value.")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def widths(name: str, text: str) -> tuple[int, ...]:
    """Reads a list of widths, 2,3,4,8.

    Raises:
        ConfigError: It is none.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{name} {text!r} is no list of widths. Write 2,3,4,8.") from None
