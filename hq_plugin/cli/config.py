"""Options of the command line as keywords of `hq_plugin.Config`; what a user did not give is left out."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from hq_plugin.cli.references import named_values, widths
from hq_plugin.errors import ConfigError


def config_options(
    others: Sequence[str] | None,
    *,
    weight_bits: str | None = None,
    activation_bits: str | None = None,
    **given: StrEnum | Path | int | None,
) -> dict[str, Any]:
    """Returns fields of `Config`.

    Args:
        others: What `--option` gave, each `name=value`.
        weight_bits: A list of widths.
        activation_bits: A list of widths.
        **given: Fields by name; None is one that was not given.

    Raises:
        ConfigError: A list of widths or a pair cannot be read, or a field was given twice.
    """
    options: dict[str, Any] = {
        name: value.value if isinstance(value, StrEnum) else value
        for name, value in given.items()
        if value is not None
    }
    for name, text in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        if text is not None:
            options[name] = widths(name, text)
    named = named_values("--option", others)
    for name in options.keys() & named.keys():
        raise ConfigError(f"{name} was given twice: as --{name.replace('_', '-')} and as --option.")
    if isinstance(named.get("pinned"), dict):  # JSON has no tuples
        named["pinned"] = {k: tuple(v) if isinstance(v, list) else v for k, v in named["pinned"].items()}
    return options | named
