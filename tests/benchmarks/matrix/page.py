"""Writes docs/benchmarks/matrix.md and a plot for each model, from the rows.

python -m tests.benchmarks --page
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.benchmarks.matrix import claims_page, plots, rows
from tests.benchmarks.matrix.rows import Row

PAGE = rows.FOLDER / "matrix.md"
NAMES = {
    "uniform_ptq": "best uniform policy, rounded and calibrated",
    "uniform": "best uniform policy, QAT",
    "random": "random policy, QAT",
    "dynamic_programming": "dynamic programming on additive sensitivities, QAT",
    "dynamic_programming_blocks": "the same policy, trained as hq_plugin trains (blocks compared, scores softened)",
    "hawq": "HAWQ-V2 traces, QAT",
    "haq": "HAQ (DDPG agent), QAT",
    "evopress": "EvoPress (level-switch evolution), QAT",
    "hq_dense": "**hq_plugin** (`dense`)",
    "hq_auto": "**hq_plugin** (`auto`: dense where small, low-rank where large)",
    "hq_low_rank": "hq_plugin (`low_rank`)",
    "hq_table": "hq_plugin (`table`, no network)",
}
#: hq_plugin as it is called by default, on which ratios are taken: of these, the one that a model has.
MAIN = ("hq_dense", "hq_auto")
#: Ours in whole or in part: nothing of it is a rival in the ratios.
OURS = (*MAIN, "hq_low_rank", "hq_table", "dynamic_programming_blocks")
HEAD = """# The matrix: hq_plugin against everything else, at equal bytes and equal training

Written by `{command}` from the rows in matrix.jsonl (and, for libraries in environments of their own,
rivals.jsonl). How to run it, and what each method does, is in [How the matrix is measured](running.md).

Mean ± standard deviation over seeds. *Distance* is the KL divergence to the float model on test data, in nats;
for sentence embeddings it is 1 − cosine. *Scored*: policies that were scored to find this one. *Seconds*:
allocation, with everything that it needed, and training; processor seconds and the machine's load are in the
rows. *Peak memory* is that of the process. *Ratio* is hq_plugin's distance over that of the best of all other
methods at this budget: below 1 it is the closest.

All rows of a model at one budget are of one file format and, but for other libraries' (rivals.jsonl), one float
network; their date is in them. Float networks are trained once a machine, and differ between machines. What was
mended or changed since some rows were measured is [listed](running.md#methods).
"""
COMMAND = "python -m tests.benchmarks"


def write(
    path: Path = PAGE,
    matrix: Path = rows.MATRIX,
    rivals: Path = rows.RIVALS,
    claimed: Path = rows.CLAIMS,
) -> None:
    """Writes the page and the plots beside it."""
    found = rows.latest([*rows.read(matrix), *(adapted(row) for row in rows.read(rivals))])
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [HEAD.format(command=COMMAND)]
    models = list(dict.fromkeys(row["model"] for row in found))
    if models:
        text += ["## In short", "", *_summary(found), ""]
    for model in models:
        mine = [row for row in found if row["model"] == model]
        text += [f"## {model}{_float_accuracy(mine)}", ""]
        plot = path.parent / f"matrix-{model.replace(':', '-')}.svg"
        if plots.draw(model, _runs(mine), plot, NAMES, OURS):
            text += [f"![Distance against bytes, {model}]({plot.name})", ""]
        for steps, budget in _places(mine):
            here = [row for row in mine if _at(row, steps, budget)]
            text += [f"**{budget}, {_steps(steps)}**", "", *_another_network(mine, here), *_table(here), ""]
        text += _failures(mine)
    text += claims_page.lines(rows.latest(rows.read(claimed), claims_page.KEY))
    path.write_text("\n".join(text).rstrip() + "\n")


def adapted(row: Row) -> Row:
    """Returns a row of a library in an environment of its own with the fields of the matrix.

    Those that train by our loop take `rows.RIVAL_STEPS`; the others train as they like, or not
    at all, and name none.
    """
    more: Row = {}
    if row.get("kl") is not None:
        more["distance"] = row["kl"]
    elif row.get("cosine") is not None:
        more["distance"] = 1 - row["cosine"]
    if row.get("seconds"):
        more["total_seconds"] = sum(row["seconds"].values())
        if "train" in row["seconds"]:
            more["steps"] = rows.RIVAL_STEPS
    if row.get("peak_gb") is not None:
        more["peak_memory"] = {"process": row["peak_gb"] * 1e9}
    return {**more, **row}


def _runs(found: Sequence[Row]) -> list[Row]:
    """Returns the rows that did not fail."""
    return [row for row in found if "error" not in row and row.get("distance") is not None]


def _float_accuracy(found: Sequence[Row]) -> str:
    """Returns the float accuracy of the matrix's own network; rivals were given another training of it."""
    known = [row["float_accuracy"] for row in found if "trained_steps" in row and row.get("float_accuracy")]
    return f", float accuracy {known[0]:.4f}" if known else ""


def _another_network(model: Sequence[Row], here: Sequence[Row]) -> list[str]:
    """Returns what to say where a budget's rows are of another float network than the model's first ones."""
    first, mine = _float_accuracy(model), _float_accuracy(here)
    if not mine or mine == first:
        return []
    return [f"Another training of the float network{mine}: distances compare within this table alone.", ""]


def _steps(steps: int | None) -> str:
    return "as they ship" if steps is None else f"{steps} training steps"


def _at(row: Row, steps: int | None, budget: str) -> bool:
    """Whether a row belongs to a table: rivals that train as they like (no `steps`) are in all of the budget."""
    return row["budget"] == budget and row.get("steps") in (steps, None)


def _places(found: Sequence[Row]) -> Iterator[tuple[int | None, str]]:
    places = {(row.get("steps"), row["budget"]) for row in found}
    trained = {budget for steps, budget in places if steps is not None}
    for steps, budget in sorted(places, key=lambda place: (-(place[0] or 0), _size(place[1]))):
        if steps is not None or budget not in trained:
            yield steps, budget


def _size(budget: str) -> tuple[float, str]:
    digits = "".join(c if c.isdigit() or c == "." else " " for c in budget).split()
    return (float(digits[0]) if digits else 0.0), budget


def mean(found: Sequence[Row], name: str) -> float | None:
    """Returns the mean of a field over the rows that have it."""
    values = [row[name] for row in found if row.get(name) is not None]
    return statistics.mean(values) if values else None


def spread(found: Sequence[Row], name: str, digits: int) -> str:
    """Returns mean ± standard deviation over seeds, or a dash."""
    values = [row[name] for row in found if row.get(name) is not None]
    if not values:
        return "–"
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def ratio(found: Sequence[Row]) -> tuple[float, str] | None:
    """Returns our mean distance over that of the best other method of a budget, and who that is.

    Each is compared on the seeds that both have, so that a lucky one is held against nobody.
    """
    good = _runs(found)
    ours = next((rows for name in MAIN if (rows := [row for row in good if row["method"] == name])), [])
    ratios = {}
    for method in dict.fromkeys(row["method"] for row in good if row["method"] not in OURS):
        theirs = [row for row in good if row["method"] == method]
        common = {row["seed"] for row in ours} & {row["seed"] for row in theirs}
        mine = mean([row for row in ours if row["seed"] in common], "distance")
        other = mean([row for row in theirs if row["seed"] in common], "distance")
        if mine is not None and other is not None:
            ratios[method] = mine / max(other, 1e-12)
    return max(((value, name) for name, value in ratios.items()), default=None)


def _summary(found: Sequence[Row]) -> list[str]:
    text = ["| model | steps | budget | best other method | ratio | seeds |", "|---|---|---|---|---|---|"]
    for model in dict.fromkeys(row["model"] for row in found):
        mine = [row for row in found if row["model"] == model]
        for steps, budget in _places(mine):
            here = [row for row in mine if _at(row, steps, budget)]
            compared = ratio(here)
            if compared:
                value, best = compared
                of = [{row["seed"] for row in _runs(here) if row["method"] in names} for names in (MAIN, (best,))]
                seeds = len(of[0] & of[1])
                named = NAMES.get(best, best)
                text.append(f"| {model} | {steps} | {budget} | {named} | {value:.2f} | {seeds} |")
    return text


def _table(found: Sequence[Row]) -> list[str]:
    extra = [
        (name, digits)
        for name, digits in (
            ("agreement", 4),
            ("accuracy", 4),
            ("perplexity", 2),
            ("cosine", 4),
            ("spearman", 4),
        )
        if any(row.get(name) is not None for row in found)
    ]
    columns = ["method", "distance", *(name for name, _ in extra), "effective bits", "bytes", "MBitOps"]
    columns += ["scored", "seconds", "peak memory, MB", "seeds"]
    text = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    present = list(dict.fromkeys(row["method"] for row in found))
    for method in sorted(present, key=lambda name: list(NAMES).index(name) if name in NAMES else -1):
        same = [row for row in _runs(found) if row["method"] == method]
        if not same:
            continue
        size, work, scored = mean(same, "bytes"), mean(same, "bitops"), mean(same, "scored")
        peaks = [row["peak_memory"]["process"] for row in same if row.get("peak_memory")]
        cells = [NAMES.get(method, method), spread(same, "distance", 4)]
        cells += [spread(same, name, digits) for name, digits in extra]
        cells += [spread(same, "effective_bits", 3), *(_whole(value) for value in (size,))]
        cells += [_whole(None if work is None else work / 1e6), _whole(scored)]
        cells += [spread(same, "total_seconds", 0), _whole(max(peaks) / 1e6 if peaks else None), str(len(same))]
        text.append(f"| {' | '.join(cells)} |")
    compared = ratio(found)
    if compared:
        best = NAMES.get(compared[1], compared[1])
        text += ["", f"Ratio to the best other method ({best}): **{compared[0]:.2f}**"]
    return text


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _failures(found: Sequence[Row]) -> list[str]:
    failed = [row for row in found if "error" in row]
    if not failed:
        return []
    text = ["Failed:", ""]
    for row in failed:
        reason = str(row["error"]).strip().splitlines() or [""]
        named = NAMES.get(row["method"], row["method"])
        text.append(f"- {named}, {row['budget']}, seed {row.get('seed')}: `{reason[0][:300]}`")
    return [*text, ""]
