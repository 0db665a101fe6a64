"""Numbers and names as a report writes them, escaped for HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence

from hq_plugin.budget import format_bytes
from hq_plugin.policy import FLOAT_BITS, LEFT_OUT
from hq_plugin.report.document import Layer


def escape(text: object) -> str:
    """Returns text that HTML shows as it is, also inside attributes."""
    return html.escape(str(text), quote=True)


def number(value: float | None) -> str:
    """Writes a measured number with three significant digits; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def share(value: float | None) -> str:
    """Writes a share as per cent."""
    return "–" if value is None else f"{value * 100:.1f} %"


def duration(seconds: float) -> str:
    """Writes a time for people."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def plural(count: int, one: str) -> str:
    """Writes a count with its noun."""
    many = f"{one[:-1]}ies" if one.endswith("y") else f"{one}s"
    return f"{count:,} {one if count == 1 else many}"


def module_name(name: str) -> str:
    """Returns the name of a module as HTML that may break after each dot."""
    return escape(name).replace(".", ".<wbr>")


def size_of(shape: Sequence[int]) -> str:
    """Writes the shape of a tensor."""
    return " × ".join(map(str, shape)) or "scalar"


def widths(layer: Layer) -> str:
    """Writes a layer's widths in words."""
    inputs = "float inputs" if layer.activation_bits == FLOAT_BITS else f"{layer.activation_bits}-bit inputs"
    group = f" in groups of {layer.group_size}" if layer.group_size else ""
    if layer.dynamic:
        inputs += " with a step for each row"
    return f"{layer.weight_bits}-bit weights{group}, {inputs}"


def bytes_of(layer: Layer, shared: str = "shared") -> str:
    """Returns the bytes of a layer, or why it has none: left out, or words for sharing its weights."""
    if layer.weight_bits == LEFT_OUT:
        return "left out"
    return format_bytes(layer.size) if layer.size else shared


def description(layer: Layer, distance_name: str) -> str:
    """Describes a layer, one fact a line: its tooltip and its accessible name."""
    lines = [
        layer.name,
        widths(layer),
        f"{layer.kind}, {size_of(layer.shape)} = {plural(layer.weights, 'weight')}",
        bytes_of(layer, "shares its weights, no bytes of its own"),
    ]
    if layer.sensitivity is not None:
        lines.append(f"sensitivity {number(max(layer.sensitivity, 0.0))} ({distance_name}, alone)")
    if layer.activation_low is not None and layer.activation_high is not None:
        lines.append(f"inputs from {number(layer.activation_low)} to {number(layer.activation_high)}")
    if layer.shares_with:
        lines.append(f"shares its widths with {', '.join(layer.shares_with)}")
    return "\n".join(lines)
