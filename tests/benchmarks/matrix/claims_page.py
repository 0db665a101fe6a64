"""The part of the page that has the claims of the paper, each with its number."""

from __future__ import annotations

from collections.abc import Sequence

from tests.benchmarks.matrix import rank_correlation
from tests.benchmarks.matrix.rows import Row

#: What a row of a claim is known by.
KEY = ("claim", "model", "seed", "budget", "side", "pool", "number", "steps", "finetune")


def lines(found: Sequence[Row]) -> list[str]:
    """Returns the sections of the claims that have rows."""
    text: list[str] = []
    for claim, part in (("search", _search), ("front", _front), ("tau", _tau)):
        mine = [row for row in found if row["claim"] == claim]
        good = [row for row in mine if "error" not in row]
        if good:
            text += part(good)
        text += [
            f"- failed: {row['model']}, seed {row['seed']}: `{row['error']}`" for row in mine if "error" in row
        ]
    return text


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *body)]


def _search(found: Sequence[Row]) -> list[str]:
    body = []
    for row in found:
        ours, haq, evopress = row["ours"], row["haq"], row["evopress"]
        at = f"{haq['episodes'] / ours['evaluations']:.1f} ×"
        earlier = haq["ours_to_its_best"]
        body.append(
            [
                f"{row['model']}, {row['budget']}, seed {row['seed']}",
                f"{row['goal']:.4f}",
                f"{ours['evaluations']}, {ours['seconds']:.0f} s",
                f"{haq['episodes']:,} ({haq['evaluations']} policies), {haq['seconds']:.0f} s",
                at if haq["reached"] else f"not after {at} (best {haq['best']:.4f})",
                "–" if earlier is None else f"{earlier} ({haq['evaluations'] / earlier:.1f} × fewer)",
                f"{evopress['best']:.4f}" + (" (reached)" if evopress["reached"] else ""),
            ]
        )
    header = ["", "goal", "genetic search", "HAQ's agent: episodes", "episodes to our evaluations"]
    header += ["our evaluations to the agent's best", "EvoPress, as many evaluations as ours"]
    return [
        "## Claim: fewer evaluations than a reinforcement-learning search",
        "",
        "The goal is the held-out distance that the genetic search reaches; all search on the same scores, those",
        "of the rounded float network. Ours counts the additive sensitivities that it starts from (measured on a",
        "quarter of the samples, counted in full). The agent stops at the goal, or after ten times our search's",
        "evaluations without the sensitivities. An episode is a policy that it tries; those that it has tried",
        "before are not evaluated again.",
        "",
        *_table(header, body),
        "",
    ]


def _front(found: Sequence[Row]) -> list[str]:
    text = [
        "## Claim: one MetaQuantNet for five budgets",
        "",
        "One meta-training, then search and fine-tuning for each budget, against five runs of dynamic programming",
        "and quantization-aware training, each of which measures sensitivities and trains all of its steps. They",
        "are trained end to end on the distance itself, as the rivals of the matrix are, or as hq_plugin trains",
        "(blocks compared, scores softened).",
        "",
    ]
    for session in (row for row in found if row["side"] == "session"):
        named = f"{session['model']}, seed {session['seed']}, {session['steps']} steps a separate run"
        tables = []
        for side, trained in (("separate_plain", "end to end"), ("separate", "as hq_plugin trains")):
            tables += _against(session, [row for row in found if row["side"] == side], trained)
        text += [f"**{named}**", "", *tables] if tables else []
    return text


def _against(session: Row, separate: Sequence[Row], trained: str) -> list[str]:
    names = ("model", "seed", "steps")
    others = {row["budget"]: row for row in separate if all(row[name] == session[name] for name in names)}
    points = [point for point in session["points"] if point["budget"] in others]
    if not points:
        return []
    body = []
    for point in points:
        other = others[point["budget"]]
        relative = f"{point['distance'] / max(other['distance'], 1e-12):.2f}"
        row = [point["budget"], f"{point['distance']:.4f}", f"{other['distance']:.4f}", relative]
        body.append([*row, f"{point['seconds']:.0f}", f"{other['seconds']:.0f}"])
    total = sum(others[point["budget"]]["seconds"] for point in points)
    header = ["budget", "one session", f"separate run, trained {trained}", "ratio", "seconds", "seconds, separate"]
    summary = (
        f"Together: {session['seconds']:.0f} s ({session['meta_seconds']:.0f} of them before the first budget) "
        f"against {total:.0f} s, **{session['seconds'] / total:.2f} ×**."
    )
    return [*_table(header, body), "", summary, ""]


def _tau(found: Sequence[Row]) -> list[str]:
    body = []
    kinds = {(row["model"], row["seed"], row["pool"], row.get("budget"), row["finetune"]) for row in found}
    for model, seed, pool, budget, finetune in sorted(kinds, key=str):
        same = [
            row
            for row in found
            if (row["model"], row["seed"], row["pool"], row.get("budget"), row["finetune"])
            == (model, seed, pool, budget, finetune)
        ]
        if len(same) < 3:
            continue
        where = "across budgets" if pool == "across" else f"within {budget}"
        values = rank_correlation.taus(same)
        body.append(
            [f"{model}, seed {seed}", where, str(len(same)), str(finetune), *(f"{v:.2f}" for v in values.values())]
        )
    header = ["", "pool", "policies", "steps", *rank_correlation.PREDICTORS.values()]
    return [
        "## What the paper leaves open: does the score predict the result?",
        "",
        "Kendall's tau between a predictor before training and the distance on test data after fine-tuning. Across",
        "budgets, counting bits alone predicts much; within one budget all policies have the same bytes, which is",
        "what a search must tell apart.",
        "",
        *_table(header, body),
        "",
    ]
