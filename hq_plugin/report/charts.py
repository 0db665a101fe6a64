"""The charts of a report: the front with everything that was scored, the search, and training."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hq_plugin.report.document import AXES, Candidate, Document, FrontPoint, Policy, format_cost
from hq_plugin.report.plot import SYMBOLS, Plot
from hq_plugin.report.text import escape, number

#: Symbol and class of each candidate.
MARKS = {
    "uniform": ("square", "uniform"),
    "dynamic_programming": ("diamond", "planned"),
    "searched": ("triangle", "searched"),
    "result": ("ring", "result"),
}
#: Lines of training with more points than this are thinned: a page needs no more.
_POINTS = 400
#: Policies that a chart shows at most: on the front the best, in the search every so many.
_POPULATION = 600


def cost(of: Candidate | Policy | FrontPoint, axis: str) -> float | None:
    """Returns what a policy costs along an axis."""
    value: float | None = getattr(of, axis)
    return value


def front_chart(document: Document, *, near: bool = False) -> str:
    """Draws the distance to the float model over what a policy costs.

    Args:
        document: The report.
        near: Whether to show the surroundings of what the search scored, instead of the whole front.

    Returns:
        The SVG, or an empty text where there is nothing to show.
    """
    axis = document.front_axis
    population = sorted(
        (
            (x, p.score, p)
            for p in document.policies
            if (x := cost(p, axis)) is not None and p.score and p.score > 0
        ),
        key=lambda point: point[1],
    )[:_POPULATION]
    candidates = [
        (x, c.distance, c)
        for c in document.candidates
        if c.name in MARKS and (x := cost(c, axis)) is not None and c.distance and c.distance > 0
    ]
    measured = [(x, y) for x, y, _ in (*population, *candidates)]
    if near:
        # The uniform policy is often far off, and the result has trained on: both would squeeze the rest.
        others = [(x, y) for x, y, c in candidates if c.name not in ("uniform", "result")]
        measured = others + [(x, y) for x, y, _ in population]
        if len(population) < 2:
            return ""
    least = min((y for _, y in measured), default=0.0)
    predicted = [
        (float(x), point.predicted)
        for point in document.front
        if (x := cost(point, axis)) is not None and point.predicted > least / 10
    ]
    shown = measured if near else [*measured, *predicted]
    if not shown:
        return ""
    title = "The policies that were scored, near the budget" if near else "The front, and what was scored"
    plot = Plot(
        title,
        [x for x, _ in shown],
        [y for _, y in shown],
        AXES[axis],
        document.distance_name,
    )
    if not near:
        plot.line(predicted, "predicted")
    for x, y, policy in population:
        text = f"policy {policy.evaluation + 1} of the search\n{format_cost(axis, x)}"
        plot.mark(x, y, "dot", "scored", f"{text}\n{document.distance_name} {number(y)}")
    plot.line(_lower_left([(x, y) for x, y, _ in population]), "front", steps=True)
    for x, y, candidate in candidates:
        symbol, kind = MARKS[candidate.name]
        if near and not (plot.y.low <= math.log10(y) <= plot.y.high and plot.x.low <= x <= plot.x.high):
            continue
        text = f"{candidate.label}{', chosen' if candidate.chosen else ''}\n{format_cost(axis, x)}"
        label = "result" if candidate.name == "result" else ""
        plot.mark(x, y, symbol, kind, f"{text}\n{document.distance_name} {number(y)}", label)
    return plot.svg()


def _lower_left(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points that no other one betters in both coordinates, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def search_chart(document: Document) -> str:
    """Draws the score of each policy in the order of the search, and the best until then."""
    points = [(p.evaluation + 1.0, p.score) for p in document.policies if p.score is not None and p.score > 0]
    if len(points) < 2:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    plot = Plot("Search: scores in their order", xs, ys, "policies scored", document.distance_name, counts=True)
    for x, y in points[:: -(-len(points) // _POPULATION)]:
        plot.mark(x, y, "dot", "scored")
    best: list[tuple[float, float]] = []
    for x, y in points:
        if not best or y < best[-1][1]:
            best.append((x, y))
    plot.line([*best, (points[-1][0], best[-1][1])], "best", steps=True)
    return plot.svg()


def training_chart(document: Document, stage: str, title: str) -> str:
    """Draws the losses of a stage of training, and their running mean."""
    points = [(float(step + 1), loss) for step, loss in document.training.get(stage, ()) if loss > 0]
    if len(points) < 2:
        return ""
    smooth, mean, weight = [], 0.0, min(0.6, 20 / len(points))
    for n, (step, loss) in enumerate(points):
        mean = math.log(loss) if n == 0 else mean + weight * (math.log(loss) - mean)
        smooth.append((step, math.exp(mean)))
    every = -(-len(points) // _POINTS)
    plot = Plot(title, [x for x, _ in points], [y for _, y in points], "steps", "loss", counts=True)
    plot.line(points[::every], "raw")
    plot.line(smooth[::every], "smooth")
    return plot.svg()


def front_legend(document: Document) -> str:
    """Explains the marks of the fronts."""
    entries = []
    if document.policies:
        entries.append(("dot", "scored", "scored by the search"))
    names = {candidate.name for candidate in document.candidates}
    labels = {
        "uniform": "best uniform",
        "dynamic_programming": "dynamic programming",
        "searched": "genetic search",
        "result": "result, fine-tuned",
    }
    entries += [(*MARKS[name], label) for name, label in labels.items() if name in names]
    items = "".join(
        f'<li><svg viewBox="-8 -8 16 16" aria-hidden="true"><g class="{kind}">{SYMBOLS[symbol]}</g></svg>'
        f"{escape(text)}</li>"
        for symbol, kind, text in entries
    )
    if document.front:
        items += (
            '<li><svg viewBox="-8 -8 16 16" aria-hidden="true"><path class="predicted" d="M-8 0H8"/></svg>'
            "predicted by adding up sensitivities</li>"
        )
    return f'<ul class="legend">{items}</ul>'
