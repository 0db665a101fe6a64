"""Plots of the matrix: distance against bytes, one file a model."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from tests.benchmarks.matrix.rows import Row


def draw(model: str, found: Sequence[Row], path: Path, names: Mapping[str, str], ours: Collection[str]) -> bool:
    """Draws the rows of a model with the most training steps.

    Args:
        model: Its name.
        found: Its rows.
        path: The SVG file.
        names: Labels of methods.
        ours: hq_plugin's methods, which are drawn in colour and thicker.

    Returns:
        Whether there was anything to draw.
    """
    most = max((row["steps"] for row in found if row.get("steps") is not None), default=None)
    shown = [row for row in found if row.get("steps") in (most, None) and row.get("bytes")]
    if not shown:
        return False
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "matrix"  # the same rows give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for number, method in enumerate(dict.fromkeys(row["method"] for row in shown)):
        mine = [row for row in shown if row["method"] == method]
        points = []
        for budget in dict.fromkeys(row["budget"] for row in mine):
            same = [row for row in mine if row["budget"] == budget]
            points.append(tuple(statistics.mean(row[name] for row in same) for name in ("bytes", "distance")))
        label = names.get(method, method).replace("*", "").replace("`", "")
        style = {"linewidth": 2.2, "marker": "o"} if method in ours else {"linewidth": 1, "marker": "x"}
        sizes, distances = zip(*sorted(points), strict=True)
        axes.plot([size / 1e3 for size in sizes], distances, label=label, color=f"C{number}", **style)
    axes.set_yscale("log")
    axes.set_xlabel("kilobytes")
    axes.set_ylabel("distance to the float model")
    axes.set_title(model if most is None else f"{model}, {most} training steps", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True
