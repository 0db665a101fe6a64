"""Writes docs/benchmarks/spine.md from the rows that `spine.py` measured.

python -m tests.benchmarks.table
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from tests.benchmarks.spine import FINETUNE, META, ONE_CALL_FINETUNE, ONE_CALL_META, STEPS, finished

OUT = Path("docs/benchmarks/spine.md")
NAMES = {
    "uniform": "best uniform policy, QAT",
    "dynamic_programming": "dynamic programming on additive sensitivities, QAT",
    "one_call": "**hq_plugin**, one call (`dense`)",
    "low_rank": "hq_plugin, one call, `low_rank`",
    "table": "hq_plugin, one call, `table` (no network)",
    "session": "hq_plugin, one session for three budgets (`dense`)",
}


def _spread(rows: list[dict[str, Any]], key: str, digits: int) -> str:
    values = [row[key] for row in rows]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def lines() -> list[str]:
    """Returns the page, line by line."""
    rows = finished()
    text = [
        "# Hybrid against uniform and dynamic programming, at equal training steps",
        "",
        "Fashion-MNIST, 10,000 test images. KL to the float model in nats; mean ± standard deviation over",
        f"seeds. The rivals train {STEPS} steps of 128 images for each budget, as does hq_plugin's one call",
        f"({ONE_CALL_META} of meta-training, {ONE_CALL_FINETUNE} of fine-tuning). A session is equal",
        f"over the three budgets together: {META} steps of meta-training once, {FINETUNE} of fine-tuning for each.",
        "The best uniform policy has 2-bit weights at all three budgets: with their steps, 3-bit weights have",
        "3.09 effective bits on the ResNet. The ablation (`low_rank`, `table`) is at 2.5 bits.",
        "Same loop, loss, quantizers and learning rates. Activations: 4, 6 or 8 bits, 8 unless BitOps are limited.",
        "",
        "Measured before the outputs of blocks were compared and each weight had a rate of its own: the present",
        "defaults are in [the matrix](matrix.md). Also before held weights and language models were added: 64",
        "samples recalibrated BatchNorm for a candidate, where the default is 32 now.",
        "",
        "Reproduce: `python -m tests.benchmarks.spine && python -m tests.benchmarks.table` (hours on 2 cores;",
        "resumable, the rows are in spine.jsonl).",
        "",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        text += [f"## {model}, float accuracy {mine[0]['float_accuracy']:.4f}", ""]
        text += ["| budget | method | KL | agreement | accuracy | effective bits | bytes | seeds |"]
        text += ["|---|---|---|---|---|---|---|---|"]
        for budget in dict.fromkeys(row["budget"] for row in mine):
            for method, label in NAMES.items():
                same = [r for r in mine if (r["budget"], r["method"]) == (budget, method)]
                if same:
                    text.append(
                        f"| {budget} | {label} | {_spread(same, 'kl', 4)} | {_spread(same, 'agreement', 4)} | "
                        f"{_spread(same, 'accuracy', 4)} | {_spread(same, 'effective_bits', 3)} | "
                        f"{statistics.mean(r['bytes'] for r in same):,.0f} | {len(same)} |"
                    )
        text.append("")
    return text


if __name__ == "__main__":
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text("\n".join(lines()))
    print("\n".join(lines()))
