"""Writes docs/benchmarks/deployment.md and its plot from the rows that `deployment` measured.

python -m tests.benchmarks.deployment_page
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS = Path("docs/benchmarks/deployment.jsonl")
LATER = "after another"
PAGE, PLOT = ROWS.with_suffix(".md"), ROWS.with_suffix(".svg")
Row = dict[str, Any]

SPEED = [
    ("EfficientNet-Lite0", "batch 1"),
    ("EfficientNet-Lite0", "batch 16"),
    ("MiniLM", "batch 1"),
    ("MiniLM", "batch 32"),
    ("SmolLM2-135M", "128 tokens"),
    ("SmolLM2-135M", "prompt of 512"),
]
CONTESTANTS = ["PyTorch float", "PyTorch hybrid", "ONNX Runtime float", "ONNX Runtime hybrid"]
#: Model, case, contestant, whom it is compared with, and how many times as fast it is to be.
GOALS = [
    ("SmolLM2-135M", "128 tokens", "ONNX Runtime hybrid", "PyTorch float", 3.0),
    ("SmolLM2-135M", "128 tokens", "ONNX Runtime hybrid", "ONNX Runtime uniform 4 bits", 0.9),
    ("SmolLM2-135M", "128 tokens", "PyTorch hybrid", "PyTorch float", 1.5),
    ("SmolLM2-135M", "prompt of 512", "ONNX Runtime hybrid", "PyTorch float", 1.0),
    ("SmolLM2-135M", "prompt of 512", "PyTorch hybrid", "PyTorch float", 1.0),
    *(
        ("EfficientNet-Lite0", f"batch {batch}", contestant, other, times)
        for batch in (1, 16)
        for contestant, other, times in (
            ("ONNX Runtime hybrid", "PyTorch float", 1.8),
            ("ONNX Runtime hybrid", "ONNX Runtime float", 1.35),
            ("PyTorch hybrid", "PyTorch float", 1.0),
        )
    ),
    ("MiniLM", "batch 1", "ONNX Runtime hybrid", "PyTorch float", 1.8),
    ("MiniLM", "batch 32", "ONNX Runtime hybrid", "PyTorch float", 1.2),
    ("MiniLM", "batch 1", "ONNX Runtime hybrid", "ONNX Runtime float", 1.0),
    ("MiniLM", "batch 32", "ONNX Runtime hybrid", "ONNX Runtime float", 1.0),
]


def rows() -> dict[str, dict[tuple[str, str], Row]]:
    """Returns for each machine the last row of each model and case; the machine measured last is the first."""
    found: dict[str, dict[tuple[str, str], Row]] = {}
    for line in ROWS.read_text().splitlines():
        row = json.loads(line)
        of_machine = found.pop(row["machine"], {})
        found[row["machine"]] = {**of_machine, (row["model"], row["case"]): row}
    return dict(reversed(found.items()))


def write_page() -> None:
    """Writes the page and the plot."""
    machines = rows()
    _plot(machines)
    parts: list[Callable[[dict[tuple[str, str], Row]], list[str]]] = [_speed, _goals, _loading, _latency]
    text = [
        "# Hybrid models in PyTorch and in ONNX Runtime",
        "",
        "Written by `python -m tests.benchmarks.deployment`, from the last row of each machine and case in",
        "deployment.jsonl. What is compared, and how, is in that file and in [deployment.md](../deployment.md).",
        "",
        f"![Speed, relative to the float model in PyTorch]({PLOT.name})",
    ]
    for machine, found in machines.items():
        dates = sorted({row["date"] for row in found.values()})
        text += ["", f"## {machine}", "", f"Measured on {', '.join(dates)}."]
        for part in parts:
            body = part(found)
            text += ["", *body] if body else []
    PAGE.write_text("\n".join(text) + "\n")


def _table(header: list[str], body: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *body)]


def _speed(found: dict[tuple[str, str], Row]) -> list[str]:
    body = []
    for case in SPEED:
        if case in found:
            row = found[case]
            faster = [row["times"][base].get("ONNX Runtime hybrid") for base in CONTESTANTS[::2]]
            body.append(
                [
                    f"{case[0]}, {case[1]}",
                    *(f"{row['ms'][name]:.4g}" for name in CONTESTANTS),
                    f"{row['times']['PyTorch float']['PyTorch hybrid']:.2f} ×",
                    ", ".join(f"{times:.2f} ×" for times in faster),
                ]
            )
    header = [
        "ms",
        *CONTESTANTS,
        "PyTorch hybrid against float",
        "ONNX Runtime hybrid against PyTorch float, its own",
    ]
    if not body:
        return []
    return ["### Speed", "", "Medians; ratios are medians of those inside a round.", "", *_table(header, body)]


def _goals(found: dict[tuple[str, str], Row]) -> list[str]:
    body = []
    for model, case, contestant, other, wanted in GOALS:
        if (model, case) in found:
            seen = found[model, case]["times"][other][contestant]
            name = f"{model}, {case}: {contestant} against {other}"
            body.append([name, f"≥ {wanted:g} ×", f"{seen:.2f} ×", "yes" if seen >= wanted else "**no**"])
    small, base = (found.get(("SmolLM2-135M", f"{kind}, from_pretrained, {LATER}")) for kind in ("hybrid", "float"))
    if small and base:
        share = small["resident bytes"] / base["resident bytes"]
        name = f"SmolLM2-135M at {small['effective bits']} bits: resident memory against float32"
        body.append([name, "≤ 0.35 ×", f"{share:.2f} ×", "yes" if share <= 0.35 else "**no**"])
    for (model, case), row in found.items():
        if "load / read" in row and case.startswith("hybrid"):
            ratio = row["load / read"]
            name = f"{model}, {case}: loading against reading its bytes into float tensors"
            body.append([name, "≤ 1.5 ×", f"{ratio:.2f} ×", "yes" if ratio <= 1.5 else "**no**"])
    promises = [row for (_, case), row in found.items() if case.startswith("latency") and row["error"] <= 0.15]
    if promises:
        ratios = [row["measured / promised"] for row in promises]
        kept = all(0.85 <= ratio <= 1.15 for ratio in ratios)
        seen = f"{min(ratios):.2f} to {max(ratios):.2f} ×"
        body.append(
            [
                "Measured latency against the promise, where the profile gave no warning",
                "0.85 to 1.15 ×",
                seen,
                "yes" if kept else "**no**",
            ]
        )
    return ["### What it was to reach", "", *_table(["", "wanted", "seen", "reached"], body)]


def _loading(found: dict[tuple[str, str], Row]) -> list[str]:
    columns = ["read", "load", "load / read", "read cpu", "load cpu", "dequantize"]
    body = []
    for (model, case), row in found.items():
        if "resident bytes" in row:
            cells = [f"{model}, {case}", f"{row['resident bytes'] / 1e6:.0f}"]
            body.append(cells + [f"{row[name]:.3f}" for name in columns])
    text = [
        "Seconds, medians over fresh processes, each of which reads once and then loads once. `read` is",
        "`load_file` and `.float()` on each tensor of the file, packed bytes included (those of a float file are",
        "mapped and not read). The first load of a process waits for transformers to import modules and to build",
        "tables; the others came after that of a tiny model. `dequantize` is turning the packed weights into float",
        "weights, once loaded; `cpu` is seconds of the processors. Resident memory is that after one forward, in",
        "MB, with `cache_weights(model, False)`.",
    ]
    if not body:
        return []
    return ["### Memory and loading", "", *text, "", *_table(["", "MB", *columns], body)]


def _latency(found: dict[tuple[str, str], Row]) -> list[str]:
    columns = ["promised", "measured", "measured / promised", "drift", "error"]
    body = []
    for (model, case), row in found.items():
        if case.startswith("latency"):
            ends = ", ".join(f"{ms:.4g}" for ms in row["fastest and widest policy"])
            numbers = [f"{row[name]:.4g}" for name in columns]
            body.append([f"{model}, {case.removeprefix('latency, ')}", ends, *numbers])
    if not body:
        return []
    header = ["", "fastest and widest policy", *columns]
    text = [
        "Milliseconds of one sample. Weights of 4 or 8 bits, inputs of 8 bits or float; budgets lie between the",
        "fastest and the widest policy. `drift` is by how much the time of one and the same model changed between",
        "the profile and the measurement: what the machine did, and not the promise. `error` is what the profile",
        "says of itself: by how much layers' times did not add up to the model's. Above 0.15 it warns.",
    ]
    return ["### Latency as a budget", "", *text, "", *_table(header, body)]


def _plot(machines: dict[str, dict[tuple[str, str], Row]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "deployment"  # the same rows give the same file
    from matplotlib import pyplot

    timed = {name: found for name, found in machines.items() if any(case in found for case in SPEED)}
    figure, every = pyplot.subplots(
        len(timed), figsize=(9, 3.8 * len(timed)), layout="constrained", squeeze=False, sharex=True
    )
    width = 0.8 / len(CONTESTANTS)
    for (machine, found), axes in zip(timed.items(), every[:, 0], strict=True):
        for number, name in enumerate(CONTESTANTS):
            speeds = {
                at: found[case]["times"]["PyTorch float"][name] for at, case in enumerate(SPEED) if case in found
            }
            places = [at + (number - (len(CONTESTANTS) - 1) / 2) * width for at in speeds]
            colour = ("#9ecae1", "#08519c", "#fdae6b", "#d94801")[number]
            bars = axes.bar(places, list(speeds.values()), width, label=name, color=colour)
            axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
        axes.axhline(1, color="black", linewidth=0.6)
        axes.set_title(machine, fontsize=8)
        axes.set_xticks(range(len(SPEED)), [f"{model}\n{case}" for model, case in SPEED], fontsize=8)
        axes.set_ylabel("times as fast as float32 PyTorch")
        axes.spines[["top", "right"]].set_visible(False)
    every[0, 0].legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(PLOT, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    write_page()
