"""A plot as inline SVG: two scales, axes, and marks on them. It knows nothing of quantization."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from hq_plugin.budget import format_count
from hq_plugin.report.text import escape

#: Size of a plot in its own units: text stays readable where a phone shows it at 320 pixels.
WIDTH, HEIGHT = 400, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 12, 42

#: Least range of a logarithmic axis, in decades.
_NARROWEST = 0.15

#: Marks by name, drawn around the origin.
SYMBOLS = {
    "dot": '<circle r="2.4"/>',
    "square": '<rect x="-4.5" y="-4.5" width="9" height="9"/>',
    "diamond": '<path d="M0-6 6 0 0 6-6 0Z"/>',
    "triangle": '<path d="M0-6 5.6 4.4H-5.6Z"/>',
    "ring": '<circle r="6"/><circle class="core" r="2.6"/>',
}


class Scale:
    """Maps values to pixels along one axis, linearly or by their logarithm.

    Args:
        values: What must be on the axis.
        start: Pixel of the smallest value.
        end: Pixel of the largest.
        log: Whether to map logarithms; values must be positive.
        margin: Share of the range that is added at both ends.
    """

    def __init__(
        self, values: Iterable[float], start: float, end: float, *, log: bool = False, margin: float = 0.04
    ) -> None:
        known = [math.log10(value) if log else value for value in values]
        low, high = min(known, default=0.0), max(known, default=1.0)
        spread = (high - low) * margin or (0.15 if log else abs(high) * 0.05 or 0.5)
        if log:  # differences of a few per cent are not blown up
            spread = max(spread, (_NARROWEST - (high - low)) / 2)
        self.log, self.start, self.end = log, start, end
        self.low, self.high = low - spread, high + spread

    def __call__(self, value: float) -> float:
        """Returns the pixel of a value."""
        at = math.log10(value) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Returns round values along the axis: four to eight of them."""
        if not self.log:
            return _round_values(self.low, self.high)
        decades = range(math.ceil(self.low), math.floor(self.high) + 1)
        if len(decades) >= 3:
            step = -(-len(decades) // 7)
            return [10.0**decade for decade in decades if decade % step == 0]
        steps = (1, 2, 5) if self.high - self.low < 2 else (1, 3)
        wide = range(math.floor(self.low), math.ceil(self.high) + 1)
        values = [step * 10.0**decade for decade in wide for step in steps]
        inside = [value for value in values if self.low <= math.log10(value) <= self.high]
        return inside if len(inside) >= 3 else _round_values(10**self.low, 10**self.high)


def _round_values(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


class Plot:
    """A plot under construction.

    Args:
        title: What it shows; its accessible name.
        x: Values along the horizontal axis.
        y: Values along the vertical axis.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        log_y: Whether the vertical axis is logarithmic.
        counts: Whether the horizontal axis counts something: then its ticks are whole numbers.
    """

    def __init__(
        self,
        title: str,
        x: Iterable[float],
        y: Iterable[float],
        x_label: str,
        y_label: str,
        *,
        log_y: bool = True,
        counts: bool = False,
    ) -> None:
        self.title, self.counts = title, counts
        self.x = Scale(x, _LEFT, WIDTH - _RIGHT)
        self.y = Scale(y, HEIGHT - _BOTTOM, _TOP, log=log_y)
        self._parts: list[str] = [self._axes(x_label, y_label)]

    def _axes(self, x_label: str, y_label: str) -> str:
        bottom, parts = HEIGHT - _BOTTOM, []
        heights = self.y.ticks()
        for value, text in zip(heights, ticks(heights), strict=True):
            at = self.y(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text class="tick y" x="{_LEFT - 6}" y="{at + 3.5:.1f}">{text}</text>')
        places = [value for value in self.x.ticks() if not self.counts or value == round(value)]
        for value, text in zip(places, ticks(places), strict=True):
            at = self.x(value)
            parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 16}">{text}</text>')
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(f'<text class="label" x="{middle:g}" y="{HEIGHT - 6}">{escape(x_label)}</text>')
        parts.append(f'<text class="label side" x="{_LEFT}" y="9">{escape(y_label)}</text>')
        return "".join(parts)

    def line(self, points: Sequence[tuple[float, float]], kind: str, *, steps: bool = False) -> None:
        """Draws a line through points; with `steps` each value holds until the next."""
        if not points:
            return
        places = [(self.x(x), self.y(y)) for x, y in points]
        path = f"M{places[0][0]:.1f} {places[0][1]:.1f}" + "".join(
            f"H{x:.1f}V{y:.1f}" if steps else f"L{x:.1f} {y:.1f}" for x, y in places[1:]
        )
        self._parts.append(f'<path class="{kind}" d="{path}"/>')

    def mark(self, x: float, y: float, symbol: str, kind: str, description: str = "", label: str = "") -> None:
        """Draws a symbol; with a description it can be reached by mouse and keyboard."""
        at = f'transform="translate({self.x(x):.1f} {self.y(y):.1f})"'
        text = ""
        if label:
            left = self.x(x) > WIDTH * 0.6
            anchor = f'x="{-10 if left else 10}" style="text-anchor:{"end" if left else "start"}"'
            text = f'<text class="note" y="4" {anchor}>{escape(label)}</text>'
        if not description:
            self._parts.append(f'<g class="{kind}" {at}>{SYMBOLS[symbol]}{text}</g>')
            return
        self._parts.append(
            f'<g class="mark {kind}" role="img" tabindex="-1" {at}><title>{escape(description)}</title>'
            f'<circle class="hit" r="7"/>{SYMBOLS[symbol]}{text}</g>'
        )

    def svg(self) -> str:
        """Returns the plot."""
        return (
            f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{escape(self.title)}" '
            f"data-marks>{''.join(self._parts)}</svg>"
        )


def ticks(values: Sequence[float]) -> list[str]:
    """Writes the values along an axis: all in one manner, with as many digits as tell them apart."""
    powers = any(0 < abs(value) < 0.001 for value in values)
    for digits in range(4, 12):
        texts = [_tick(value, digits, powers) for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts


def _tick(value: float, digits: int, powers: bool) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return format_count(value, digits).replace(" ", "")
    if powers and abs(value) < 1:
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        factor = f"{value / 10.0**exponent:.{digits}g}"
        power = f"10{str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
        return power if factor == "1" else f"{factor}·{power}"
    return f"{value:.{digits}g}"
