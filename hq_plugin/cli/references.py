"""`module:function` and integrations, found and imported by what a user wrote."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from hq_plugin.errors import ConfigError


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


def timm(reason: str) -> Any:
    """Imports the timm integration, which only some references need.

    Raises:
        ConfigError: timm is not installed.
    """
    try:
        return importlib.import_module("hq_plugin.integrations.timm")
    except ImportError as error:
        raise ConfigError(f"{reason}, and timm is missing ({error}): pip install 'hq-plugin[demo]'") from error
