"""Widths as a user writes them, 2,3,4,8, as options of `Config`."""

from __future__ import annotations

from typing import Any

from hq_plugin.errors import ConfigError


def width_options(weight_bits: str | None, activation_bits: str | None) -> dict[str, Any]:
    """Returns `weight_bits` and `activation_bits` as tuples, where they were given.

    Raises:
        ConfigError: What was written is no list of numbers.
    """
    given = (("weight_bits", weight_bits), ("activation_bits", activation_bits))
    return {name: _widths(name, text) for name, text in given if text is not None}


def _widths(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{name} {text!r} is no list of widths. Write 2,3,4,8.") from None
