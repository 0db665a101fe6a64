"""The layers of a report as HTML: widths, sensitivities and bytes, one below the other, and the same as a table.

A few layers get a row each, with their names. Many get a column each, in stages that wrap like words, so that 400
layers can be read on a phone as well as on a wide screen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from hq_plugin.budget import format_count
from hq_plugin.policy import FLOAT_BITS
from hq_plugin.report.document import Document, Layer
from hq_plugin.report.text import bytes_of, description, escape, module_name, number, size_of

#: More layers than this get columns.
ROWS = 40
#: Pixels of a column, with the gap after it; of a bit; of a sensitivity cell; of the largest layer's bytes.
_COLUMN, _GAP, _BIT, _CELL, _BYTES = 12, 2, 8, 7, 22
#: Columns of a stage: as many as fit on a phone.
_STAGE = 22
#: Decades of sensitivity that shades tell apart.
_DECADES = 4.0


def layers_figure(document: Document) -> str:
    """Returns the layers as rows or columns of marks; each mark has a `<title>` or `title` that describes it."""
    layers = document.layers
    shade = _shades(layers)
    widths = sorted({bits for layer in layers for bits in layer.sensitivities})
    largest = max(layer.size for layer in layers) or 1
    varied = len({layer.activation_bits for layer in layers}) > 1
    if len(layers) > ROWS:
        body = "".join(
            _stage(document, label, stage, widths, shade, largest, varied) for label, stage in stages(layers)
        )
        return f'<div class="stages" data-marks>{body}</div>'
    rows = "".join(_row(document, layer, widths, shade, largest, varied) for layer in layers)
    return f'<ul class="rows" data-marks>{_row_head(widths)}{rows}</ul>'


def stages(layers: Sequence[Layer]) -> list[tuple[str, list[Layer]]]:
    """Splits layers into runs that share the beginning of their names, none wider than a phone.

    The beginning is as deep as it can be while there are four layers to a run on average.
    """
    parts = [layer.name.split(".") for layer in layers]
    keys, runs = [""] * len(layers), [list(range(len(layers)))]
    for depth in (4, 3, 2, 1):
        deep = [".".join(part[: min(depth, max(len(part) - 1, 1))]) for part in parts]
        found = [list(run) for _, run in itertools.groupby(range(len(layers)), deep.__getitem__)]
        if len(found) <= len(layers) / 4:
            keys, runs = deep, found
            break
    pieces = []
    for run in runs:
        count = -(-len(run) // _STAGE)
        cuts = [round(len(run) * n / count) for n in range(count + 1)]
        for piece, (start, stop) in enumerate(itertools.pairwise(cuts)):
            key = keys[run[start]]
            if not key:
                label = f"{run[start] + 1} to {run[stop - 1] + 1}"
            elif count == 1:
                label = key
            else:
                label = _piece(key, parts[run[start]], parts[run[stop - 1]], piece)
            pieces.append((label, [layers[n] for n in run[start:stop]]))
    return pieces


def _piece(key: str, first: list[str], last: list[str], piece: int) -> str:
    """Names a piece of a run by what follows the shared beginning in its first and its last name."""
    depth = key.count(".") + 1
    begin, end = first[depth : depth + 1], last[depth : depth + 1]
    if not begin or not end or begin == end:
        return f"{key} ({piece + 1})"
    return f"{key}.{begin[0]} to {end[0]}"


def layers_table(document: Document) -> str:
    """Returns the layers as a table."""
    sensitive = any(layer.sensitivity is not None for layer in document.layers)
    head = ["layer", "kind", "weight", "bits", "inputs", "bytes", "BitOps"]
    head += ["sensitivity"] if sensitive else []
    rows = []
    for layer in document.layers:
        group = f" g{layer.group_size}" if layer.group_size else ""
        inputs = "float" if layer.activation_bits == FLOAT_BITS else str(layer.activation_bits)
        inputs += ", a row" if layer.dynamic else ""
        cells = [layer.kind, size_of(layer.shape), f"{layer.weight_bits}{group}", inputs]
        cells += [f"{layer.size:,}", format_count(layer.bitops).strip()]
        cells += [number(layer.sensitivity)] if sensitive else []
        rows.append((layer.name, *cells))
    return table(head, rows)


def activations_table(document: Document) -> str:
    """Returns what the quantized inputs of layers can hold, drawn and as a table; empty where none is known."""
    known = [layer for layer in document.layers if layer.activation_high is not None]
    if not known:
        return ""
    low = min(min(float(layer.activation_low or 0) for layer in known), 0.0)
    high = max(max(float(layer.activation_high or 0) for layer in known), 0.0)
    wide = high - low or 1.0
    rows = []
    for layer in known:
        begin, end = float(layer.activation_low or 0), float(layer.activation_high or 0)
        bar = (
            f'<svg class="range" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect x="{(begin - low) / wide * 100:.2f}" width="{max((end - begin) / wide * 100, 0.5):.2f}" y="1" '
            f'height="6"/><line x1="{-low / wide * 100:.2f}" x2="{-low / wide * 100:.2f}" y1="0" y2="8"/></svg>'
        )
        rows.append(
            (
                layer.name,
                str(layer.activation_bits),
                number(begin),
                number(end),
                bar,
                number(layer.activation_step),
                str(layer.activation_zero_point),
            )
        )
    return table(["layer", "bits", "from", "to", "range", "step", "zero point"], rows, raw=("range",))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, raw: Sequence[str] = ()) -> str:
    """Returns a table that scrolls in its own box, with the first column as the header of each row.

    Args:
        head: Names of the columns; those in parentheses are for screen readers alone.
        rows: Cells as text.
        raw: Columns whose cells are HTML.
    """
    shown = [f'<span class="hidden">{escape(n[1:-1])}</span>' if n.startswith("(") else escape(n) for n in head]
    top = "".join(f'<th scope="col">{name}</th>' for name in shown)
    body = []
    for row in rows:
        cells = [cell if name in raw else escape(cell) for name, cell in zip(head[1:], row[1:], strict=True)]
        first = row[0] if head[0] in raw else escape(row[0])
        body.append(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="Table: {escape(", ".join(head))}">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _shades(layers: Sequence[Layer]) -> dict[float, float]:
    """Maps each sensitivity to an opacity: equal steps of its logarithm, over the uppermost decades."""
    values = {rise for layer in layers for rise in layer.sensitivities.values()}
    most = max((value for value in values if math.isfinite(value)), default=0.0)
    if most <= 0:
        return dict.fromkeys(values, 0.0)
    return {
        value: min(max(1 + math.log10(value / most) / _DECADES, 0.0), 1.0) if value > 0 else 0.0 for value in values
    }


def _cells(layer: Layer, widths: Sequence[int], shade: dict[float, float]) -> list[tuple[int, float, bool]]:
    """Returns, for each width that the layer may have: its place, its shade, and whether it was chosen."""
    return [
        (place, shade[layer.sensitivities[bits]], bits == layer.weight_bits)
        for place, bits in enumerate(widths)
        if bits in layer.sensitivities
    ]


def _row_head(widths: Sequence[int]) -> str:
    digits = "".join(f'<text x="{place * 16 + 8}" y="12">{bits}</text>' for place, bits in enumerate(widths))
    cells = (
        f'<svg class="cells" viewBox="0 0 {16 * len(widths)} 16" aria-hidden="true">{digits}</svg>'
        if widths
        else ""
    )
    return (
        '<li class="row head" aria-hidden="true"><span>layer</span><span class="track-head">bits of weights</span>'
        f'<span class="bits"></span>{cells}<span class="bytes"><i></i><span>bytes</span></span></li>'
    )


def _row(
    document: Document,
    layer: Layer,
    widths: Sequence[int],
    shade: dict[float, float],
    largest: int,
    varied: bool,
) -> str:
    inputs = "f" if layer.activation_bits == FLOAT_BITS else f"A{layer.activation_bits}"
    inputs = f"<small>{inputs}</small>" if varied else ""
    cells = "".join(
        f'<rect class="{"heat chosen" if chosen else "heat"}" x="{place * 16 + 1}" y="1" width="14" height="14" '
        f'style="--s:{value:.2f}"/>'
        for place, value, chosen in _cells(layer, widths, shade)
    )
    heat = (
        f'<svg class="cells" viewBox="0 0 {16 * len(widths)} 16" aria-hidden="true">{cells}</svg>' if widths else ""
    )
    return (
        f'<li class="row" tabindex="-1" title="{escape(description(layer, document.distance_name))}">'
        f'<span class="name">{module_name(layer.name)}</span>'
        f'<span class="track"><i class="b{layer.weight_bits}" style="width:{layer.weight_bits / 8:.1%}"></i></span>'
        f'<span class="bits">{layer.weight_bits}{inputs}</span>{heat}'
        f'<span class="bytes"><i style="width:{math.sqrt(layer.size / largest):.1%}"></i>'
        f"<span>{bytes_of(layer)}</span></span></li>"
    )


def _stage(
    document: Document,
    label: str,
    layers: Sequence[Layer],
    widths: Sequence[int],
    shade: dict[float, float],
    largest: int,
    varied: bool,
) -> str:
    floor = 12 + 8 * _BIT
    heat = floor + (18 if varied else 6)
    bytes_top = heat + len(widths) * _CELL + 4
    wide, high = len(layers) * (_COLUMN + _GAP), bytes_top + _BYTES
    marks = []
    for n, layer in enumerate(layers):
        x, middle, top = n * (_COLUMN + _GAP), n * (_COLUMN + _GAP) + _COLUMN / 2, floor - layer.weight_bits * _BIT
        parts = [f'<rect class="hit" x="{x}" width="{_COLUMN}" height="{high}"/>']
        parts.append(
            f'<rect class="b{layer.weight_bits}" x="{x}" y="{top}" width="{_COLUMN}" '
            f'height="{layer.weight_bits * _BIT}"/>'
        )
        parts.append(f'<text x="{middle:g}" y="{top - 2}">{layer.weight_bits}</text>')
        if varied:
            inputs = "f" if layer.activation_bits == FLOAT_BITS else layer.activation_bits
            parts.append(f'<text class="a" x="{middle:g}" y="{floor + 11}">{inputs}</text>')
        for place, value, chosen in _cells(layer, widths, shade):
            y = heat + (len(widths) - 1 - place) * _CELL
            parts.append(
                f'<rect class="{"heat chosen" if chosen else "heat"}" x="{x + 0.5}" y="{y + 0.5}" '
                f'width="{_COLUMN - 1}" height="{_CELL - 1}" style="--s:{value:.2f}"/>'
            )
        tall = math.sqrt(layer.size / largest) * _BYTES
        parts.append(f'<rect class="size" x="{x}" y="{bytes_top}" width="{_COLUMN}" height="{tall:.1f}"/>')
        title = escape(description(layer, document.distance_name))
        marks.append(f'<g class="mark" role="img" tabindex="-1"><title>{title}</title>{"".join(parts)}</g>')
    short = ".".join(label.split(".")[-2 if len(layers) > 3 else -1 :])
    return (
        f'<figure class="stage"><figcaption title="{escape(label)}" style="max-width:{max(wide, 68)}px">'
        f"{escape(short)}</figcaption>"
        f'<svg width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" role="group" '
        f'aria-label="Layers of {escape(label)}">{"".join(marks)}</svg></figure>'
    )
