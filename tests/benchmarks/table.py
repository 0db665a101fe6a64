"""Writes the rows of the main benchmark as a Markdown table. Run as `python -m tests.benchmarks.table`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.records import Records, Row

METHODS = {
    "searched": "**meta-trained, searched, fine-tuned**",
    "dynamic_programming": "dynamic programming, then QAT",
    "uniform": "best uniform, then QAT (LSQ)",
    "dense": "ablation: all blocks dense",
    "low_rank": "ablation: all blocks low-rank",
    "table": "ablation: no network (table)",
}
COLUMNS: dict[str, Callable[[list[Row]], str]] = {
    "KL to float, nats": lambda rows: spread([row["kl"] for row in rows], 4),
    "agreement, %": lambda rows: spread([100 * row["agreement"] for row in rows], 2),
    "accuracy, %": lambda rows: spread([100 * row["accuracy"] for row in rows], 2),
    "effective bits": lambda rows: f"{largest(rows, 'effective_bits'):.3f}",
    "kB": lambda rows: f"{largest(rows, 'bytes') / 1000:.1f}",
    "MBitOps": lambda rows: f"{largest(rows, 'bitops') / 1e6:.1f}",
    "seconds": lambda rows: f"{statistics.mean(seconds(row) for row in rows):.0f}",
    "seeds": lambda rows: str(len(rows)),
}


def largest(rows: list[Row], field: str) -> float:
    """Returns the largest value of a field; costs are limits, so the worst seed counts."""
    return max(row[field] for row in rows)


def seconds(row: Row) -> float:
    """Returns the seconds of all stages; scoring is a part of the search."""
    return sum(value for stage, value in row["seconds"].items() if stage != "search_scoring")


def spread(values: list[float], digits: int) -> str:
    """Writes the mean, and the standard deviation where there are several values."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(rows: list[Row]) -> str:
    """Returns the Markdown page for rows of any networks, budgets and efforts."""
    parts = [INTRODUCTION]
    efforts = sorted({(row["meta_steps"], row["finetune_steps"]) for row in rows})
    for meta, finetune in efforts:
        same = [row for row in rows if (row["meta_steps"], row["finetune_steps"]) == (meta, finetune)]
        for network in dict.fromkeys(row["network"] for row in same):
            some = [row for row in same if row["network"] == network]
            parts.append(
                f"## {network}, {meta + finetune} training steps\n\n"
                f"Float model: {100 * some[0]['float_accuracy']:.2f} % accuracy, "
                f"{some[0]['float_bytes'] / 1000:.1f} kB. Meta-training takes {meta} of the steps, once for all "
                f"budgets, fine-tuning {finetune}; the rivals train {meta + finetune} steps for each budget."
            )
            parts += [_section(some, budget) for budget in dict.fromkeys(row["budget"] for row in some)]
    return "\n\n".join(parts) + "\n"


def _section(rows: list[Row], budget: str) -> str:
    lines = [
        f"### {budget}",
        "",
        f"| method | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for method, label in METHODS.items():
        some = [row for row in rows if row["method"] == method and row["budget"] == budget]
        if some:
            lines.append(f"| {label} | {' | '.join(column(some) for column in COLUMNS.values())} |")
    return "\n".join(lines)


INTRODUCTION = """# Accuracy at a budget

Fashion-MNIST, 10,000 test images, packed models, activations of 4 bits. Written by
`python -m tests.benchmarks.spine`, which measures every row that `spine.jsonl` lacks; what the methods
are is in its docstring. Means over seeds, ± their standard deviation; costs are those of the costliest
seed. KL is KL(float || quantized), the mean over images. Seconds are of all stages for one budget,
meta-training included."""


def write_table(records: Records) -> Path:
    """Writes the page beside the rows, and returns its path."""
    path = records.path.with_suffix(".md")
    path.write_text(table(records.rows))
    return path


def main() -> None:
    """Writes the page of the rows that there are."""
    from tests.benchmarks.spine import KEY, RESULTS

    print(write_table(Records(RESULTS, KEY)))


if __name__ == "__main__":
    main()
