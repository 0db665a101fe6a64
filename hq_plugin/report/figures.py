"""A report as matplotlib figures, for papers and notebooks. matplotlib is imported here and nowhere else.

Every panel draws on axes that it is given, from the data of `document.py`. Colours are those of the page.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hq_plugin.errors import ConfigError
from hq_plugin.report.document import AXES, Document
from hq_plugin.report.gather import gather
from hq_plugin.result import Result
from hq_plugin.storage import write_bytes

#: Colours of the widths of 1 to 8 bits, of the result, of what the search scored, and of text.
BITS = ("#9a4700", "#c4620e", "#c78a1b", "#7d8896", "#6b97d3", "#477dc4", "#2d61ae", "#1c438c")
ACCENT, SCORED, SOFT = "#2f56c8", "#c4620e", "#586271"
#: Decades of sensitivity that shades tell apart.
_DECADES = 4.0
#: Layers up to which each has its name on the axis.
_NAMES = 60


def draw(result: Result, what: str = "overview") -> Any:
    """Returns a figure of a report.

    Args:
        result: The result.
        what: A key of `PANELS`, or `"overview"`: all of them that have something to show.

    Returns:
        A `matplotlib.figure.Figure`, with no window and no global state.

    Raises:
        ConfigError: matplotlib is not installed, there is no such figure, or the result has nothing to show in it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"{error}. Figures need matplotlib: pip install 'hq-plugin[report]'.") from error
    if what != "overview" and what not in PANELS:
        raise ConfigError(f"There is no figure {what!r}. Possible are: overview, {', '.join(PANELS)}.")
    document = gather(result)
    shown = [name for name, (_, known) in PANELS.items() if known(document) and what in ("overview", name)]
    if not shown:
        raise ConfigError(f"This result holds nothing to show as {what!r}: that part of it was not kept.")
    wide = min(max(6.4, 0.16 * len(document.layers)), 24)
    if what != "overview":
        figure = Figure(figsize=(wide if what in _WIDE else 6.4, 3.6), layout="constrained")
        PANELS[what][0](document, figure.add_subplot())
        return figure
    across = [name for name in shown if name in _WIDE]
    pairs = [name for name in shown if name not in _WIDE]
    columns = max(len(pairs), 1)
    figure = Figure(figsize=(max(wide, 4.0 * columns), 3.1 * (len(across) + bool(pairs))), layout="constrained")
    grid = figure.add_gridspec(len(across) + bool(pairs), columns)
    for row, name in enumerate(across):
        PANELS[name][0](document, figure.add_subplot(grid[row, :]))
    for column, name in enumerate(pairs):
        PANELS[name][0](document, figure.add_subplot(grid[len(across), column]))
    figure.suptitle(f"{document.model}, {document.budget}")
    return figure


def save(figure: Any, path: Path) -> None:
    """Writes a figure in the format that the name says, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), dpi=160)
    write_bytes(path, content.getvalue())


def _widths(document: Document, axes: Any) -> None:
    places = np.arange(len(document.layers))
    bits = [layer.weight_bits for layer in document.layers]
    axes.bar(places, bits, color=[BITS[max(b, 1) - 1] for b in bits], width=0.85)
    inputs = [layer.activation_bits for layer in document.layers]
    if len({*inputs}) > 1:
        quantized = [(n, b) for n, b in zip(places, inputs, strict=True) if b <= 8]
        axes.plot(*zip(*quantized, strict=True), "_", color="black", label="inputs")
        axes.legend(frameon=False)
    axes.set(ylabel="bits of weights", ylim=(0, 8.6), yticks=[2, 4, 6, 8], xlim=(-0.6, len(places) - 0.4))
    _name_layers(document, axes)


def _sensitivities(document: Document, axes: Any) -> None:
    widths = sorted({bits for layer in document.layers for bits in layer.sensitivities})
    table = np.full((len(widths), len(document.layers)), np.nan)
    for column, layer in enumerate(document.layers):
        for bits, rise in layer.sensitivities.items():
            table[widths.index(bits), column] = max(rise, 0.0)
    most = float(np.nanmax(table)) or 1.0
    shades = np.log10(np.clip(table / most, 10.0**-_DECADES, None))
    image = axes.imshow(shades, aspect="auto", origin="lower", cmap="RdPu", vmin=-_DECADES, vmax=0)
    rows = [widths.index(layer.weight_bits) for layer in document.layers if layer.weight_bits in widths]
    axes.plot(np.arange(len(rows)), rows, "s", mfc="none", mec="black", ms=5)
    axes.set(ylabel="bits of weights", yticks=range(len(widths)), yticklabels=widths)
    bar = axes.figure.colorbar(image, ax=axes, ticks=[-_DECADES, -_DECADES / 2, 0], pad=0.01)
    bar.ax.set_yticklabels([f"{most * 10**at:.1g}" for at in (-_DECADES, -_DECADES / 2, 0)])
    bar.set_label(f"{document.distance_name}\nalone", fontsize="small")
    _name_layers(document, axes)


def _name_layers(document: Document, axes: Any) -> None:
    if len(document.layers) <= _NAMES:
        names = [layer.name for layer in document.layers]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
    else:
        axes.set_xlabel(f"{len(document.layers)} layers, in order")


def _front(document: Document, axes: Any) -> None:
    axis = document.front_axis
    scored = [(getattr(p, axis), p.score) for p in document.policies if p.score and getattr(p, axis) is not None]
    least = min((y for _, y in scored), default=0.0)
    predicted = [(getattr(p, axis), p.predicted) for p in document.front if p.predicted > least / 10]
    if predicted:
        axes.plot(*zip(*predicted, strict=True), "--", color=SOFT, lw=1.2, label="predicted by sensitivities")
    if scored:
        axes.plot(*zip(*scored, strict=True), ".", color=SCORED, alpha=0.4, ms=4, label="scored by the search")
    styles = {"uniform": ("s", "white"), "dynamic_programming": ("D", "white"), "searched": ("^", SCORED)}
    for candidate in document.candidates:
        x, y = getattr(candidate, axis), candidate.distance
        if x is None or not y or candidate.name == "float":
            continue
        marker, fill = styles.get(candidate.name, ("o", ACCENT))
        axes.plot(
            x, y, marker, mfc=fill, mec=ACCENT if candidate.name == "result" else "black", label=candidate.label
        )
    axes.set(xlabel=AXES[axis], ylabel=document.distance_name, yscale="log")
    axes.legend(frameon=False, fontsize="x-small")


def _search(document: Document, axes: Any) -> None:
    points = [(p.evaluation + 1, p.score) for p in document.policies if p.score and math.isfinite(p.score)]
    steps, scores = zip(*points, strict=True)
    axes.plot(steps, scores, ".", color=SCORED, alpha=0.5, ms=4)
    axes.step(steps, np.minimum.accumulate(scores), where="post", color=ACCENT)
    axes.set(xlabel="policies scored", ylabel=document.distance_name, yscale="log")


def _training(document: Document, axes: Any) -> None:
    labels = {"meta_training": ("meta-training", SOFT), "finetune": ("fine-tuning", ACCENT)}
    for stage, (label, colour) in labels.items():
        points = [(step + 1, loss) for step, loss in document.training[stage] if loss > 0]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, lw=0.9, label=label)
    axes.set(xlabel="steps", ylabel="loss", yscale="log")
    axes.legend(frameon=False)


def _has_training(document: Document) -> bool:
    return any(loss > 0 for points in document.training.values() for _, loss in points)


def _has_sensitivities(document: Document) -> bool:
    return any(layer.sensitivities for layer in document.layers)


def _has_search(document: Document) -> bool:
    return any(policy.score for policy in document.policies)


def _always(document: Document) -> bool:
    return True


Panel = Callable[[Document, Any], None]
#: The figures by name, and whether a report has something to show in each.
PANELS: dict[str, tuple[Panel, Callable[[Document], bool]]] = {
    "widths": (_widths, _always),
    "sensitivities": (_sensitivities, _has_sensitivities),
    "front": (_front, _always),
    "search": (_search, _has_search),
    "training": (_training, _has_training),
}
_WIDE: Sequence[str] = ("widths", "sensitivities")
