"""Writes docs/benchmarks/rivals.md from the rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.benchmarks.matrix import rows as matrix

OUT = Path("docs/benchmarks/rivals.md")
NAMES = {"smollm2": "SmolLM2-135M"}
INTRODUCTION = """\
# Other libraries as they ship

Each in an environment of its own, made by a script with pinned versions, on the models and data of these
benchmarks, set up as its own documentation says where that fits a CPU. What each was given is at the top of its
script in `tests/benchmarks/rivals/`.

**Counted alike for everybody**: a weight of b bits is b bits; a scale 2 bytes, an integer zero point a byte or
what the tool packs it in, a float one 2 bytes, as many as the tool has; what stays float is 4 bytes an element,
where BatchNorm is the bias that it folds into (hq_plugin's own bytes keep a scale a channel beside it, so compare
effective bits). Effective bits are those of the layers' weights with their scales and zero points. Budgets of
ModelOpt and MCT, which know no scales, are lowered by them first. KL to the float model in nats, on the 10,000
test images or the windows of text that [Language](language.md) has; never calibration data. Seconds are of a very
busy machine of 2 cores, one thread: they say little, and quanto's first row also compiles its C++.

**Images**: inputs of 8 bits for all rows here. Rows with `QAT` and `GPTQ` train for 300 steps of 128 images, as
hq_plugin does; QAT is our loop (KL to the float model, Adam at 5e-4, BatchNorm's statistics kept), since ModelOpt
and quanto leave it to the user. The others do not train, so their seconds are fewer. torchao's integer weights
and HQQ quantize linear layers only, so they have no rows here; auto-round is for language models.

**Language**: linear layers; the embedding, tied to the head, stays float and is not in the effective bits. These
weights were 4-bit in groups of 32 once: no rival has that format here. auto-round is at its light recipe.
"""
COMMAND = """\
Reproduce: `python -m tests.benchmarks.rivals && python -m tests.benchmarks.rivals --page` (resumable; the rows,
with each layer's width, versions and peak memory, are in rivals.jsonl). The float networks are trained on the
first run; for the language model see [Language](language.md)."""


def write(rows: list[dict[str, Any]], missing: Iterable[str] = ()) -> None:
    """Writes the page; `missing` is what no row says anything about yet."""
    OUT.write_text("\n".join(lines(rows, ours(), missing)) + "\n")


def ours() -> list[dict[str, Any]]:
    """Returns hq_plugin's rows of one call with the rivals' number of training steps, from the matrix."""
    return [
        {**row, "method": "**hq_plugin**, one call"}
        for row in matrix.latest(matrix.read(matrix.MATRIX))
        if row["method"] == "hq_dense" and row["steps"] == matrix.RIVAL_STEPS and "BitOps" not in row["budget"]
    ]


def lines(rows: list[dict[str, Any]], own: Iterable[dict[str, Any]] = (), missing: Iterable[str] = ()) -> list[str]:
    """Returns the page, line by line: measured rows by model and budget, then what failed."""
    own = list(own)
    text = [INTRODUCTION]
    good = [row for row in rows if "error" not in row]
    for model in dict.fromkeys(row["model"] for row in good):
        mine = [row for row in good if row["model"] == model]
        images = mine[0]["float_accuracy"] is not None
        quality = "accuracy" if images else "perplexity"
        title = NAMES.get(model, model)
        text += [f"## {title}, float accuracy {mine[0]['float_accuracy']:.4f}" if images else f"## {title}", ""]
        text += [f"| asked | method | KL | agreement | {quality} | effective bits | bytes | seconds | seeds |"]
        text += ["|---|---|---|---|---|---|---|---|---|"]
        beside = [row for row in own if row["model"] == model and "kl" in row]
        if beside:
            note = (
                "hq_plugin's rows, from [the matrix](matrix.md), are of another training of the same network "
                f"(float accuracy {beside[0]['float_accuracy']:.4f}); each KL is to its own float network."
            )
            text[-2:-2] = [note, ""]
        mine += beside
        for budget in sorted({row["budget"] for row in mine}, key=lambda name: float(name.removesuffix("bit"))):
            for method in sorted(
                {row["method"] for row in mine}, key=lambda name: (not name.startswith("*"), name)
            ):
                same = [row for row in mine if (row["budget"], row["method"]) == (budget, method)]
                if same:
                    text.append(_line(budget, method, same, quality))
        text.append("")
    failed = [row for row in rows if "error" in row]
    if failed:
        text += ["## What failed, and why", "", "| model | method | asked | reason |", "|---|---|---|---|"]
        text += [
            f"| {row['model']} | {row['method']} | {row['budget']} | {row['error'].replace('|', '/')} |"
            for row in failed
        ]
        text.append("")
    if missing := list(missing):
        text += ["## Not measured yet", "", *(f"- {what}" for what in missing), ""]
    versions = sorted({f"{name} {version}" for row in good for name, version in row["versions"].items()})
    return [*text, f"Versions: {', '.join(versions)}.", "", COMMAND]


def _line(budget: str, method: str, rows: list[dict[str, Any]], quality: str) -> str:
    def mean(name: str) -> float:
        return statistics.mean(row[name] for row in rows)

    seconds = statistics.mean(sum(row["seconds"].values()) for row in rows)
    shown = f"{mean(quality):.4f}" if quality == "accuracy" else f"{mean(quality):,.1f}"
    return (
        f"| {budget} | {method} | {mean('kl'):.4f} | {mean('agreement'):.4f} | {shown} | "
        f"{mean('effective_bits'):.3f} | {mean('bytes'):,.0f} | {seconds:,.0f} | {len(rows)} |"
    )
