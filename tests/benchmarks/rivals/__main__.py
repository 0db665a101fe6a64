"""Runs the rivals, and measures what they answer.

    python -m tests.benchmarks.rivals [--rivals ...] [--models ...] [--budgets ...] [--seeds 0] [--retry]
    python -m tests.benchmarks.rivals --page

Resumable: a finished row is one line of docs/benchmarks/rivals.jsonl and is not measured again; `--retry`
measures those again that failed. A budget is in effective bits, scales and zero points counted, for tools that
take one; for the others it is the width that all layers get.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hq_plugin.distillation import Fidelity, kl_divergence
from tests.benchmarks.rivals import environment, tasks
from tests.benchmarks.rivals.accounting import count

ROWS = Path("docs/benchmarks/rivals.jsonl")
Run = Callable[[str, Path, float, int], None]


@dataclass(frozen=True)
class Rival:
    """What a rival can do: by kind of model, the variants of its method and the budgets in bits."""

    vision: tuple[str, ...] = ()
    vision_bits: tuple[float, ...] = ()
    language: tuple[str, ...] = ()
    language_bits: tuple[float, ...] = ()

    def of(self, model: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Returns variants and budgets for a model."""
        if model in tasks.LANGUAGE:
            return self.language, self.language_bits
        return self.vision, self.vision_bits


RIVALS = {
    "modelopt": Rival(("auto_quantize", "auto_quantize, QAT"), (2.5, 3, 4)),
    "mct": Rival(("mixed precision", "mixed precision, GPTQ"), (2.5, 3, 4)),
    "quanto": Rival(("uniform", "uniform, QAT"), (2, 4), ("uniform",), (2, 4)),
    "autoround": Rival(language=("AutoScheme",), language_bits=(3.5,)),
    "torchao": Rival(language=("intx", "intx, HQQ scales"), language_bits=(3, 4)),
    "hqq": Rival(language=("uniform",), language_bits=(3, 4)),
}


def finished() -> list[dict[str, Any]]:
    """Returns the rows measured so far, of each the last."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in ROWS.read_text().splitlines() if ROWS.exists() else []:
        with contextlib.suppress(ValueError):  # a line that a stop cut short is measured again
            row = json.loads(line)
            rows[key(row)] = row
    return list(rows.values())


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Returns what a row is the measurement of."""
    return row["model"], row["seed"], row["method"], row["budget"]


def measure(model: str, folder: Path) -> dict[str, Any]:
    """Returns the fields of a row from what a rival left in its task folder."""
    said = tasks.result(folder)
    row: dict[str, Any]
    if said["measured"] is not None:
        row = {**said["measured"], "accuracy": None, "float_accuracy": None}
    else:
        labels, expected = tasks.images()[3], tasks.float_logits(model)
        fidelity = Fidelity(kl_divergence)
        fidelity.update(tasks.logits(folder), expected, labels, len(labels))
        row = {
            "kl": fidelity.distance,
            "agreement": fidelity.agreement,
            "accuracy": fidelity.accuracy,
            "float_accuracy": float((expected.argmax(1) == labels).float().mean()),
        }
    return {
        **row,
        **count(said),
        "activation_bits": said["activation_bits"],
        "seconds": said["seconds"],
        "peak_gb": round(said["peak_gb"], 2),
        "versions": said["versions"],
        "policy": {name: layer["bits"] for name, layer in said["layers"].items()},
    }


def rows(
    rival: str,
    model: str,
    budgets: list[float] | None,
    seed: int,
    done: set[tuple[Any, ...]],
    run: Run = environment.run,
    timeout: float = 3600,
    threads: int = 1,
    methods: list[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Measures what is not done yet of one rival on one model."""
    variants, own = RIVALS[rival].of(model)
    for bits in own if budgets is None else budgets:
        for variant in variants:
            row: dict[str, Any] = {"model": model, "seed": seed, "method": f"{rival} {variant}"}
            row["budget"] = f"{bits:g}bit"
            if key(row) in done or (methods and variant not in methods):
                continue
            began = time.perf_counter()
            try:
                folder = tasks.write(rival, model, variant, bits, seed)
                run(rival, folder, timeout, threads)
                row |= measure(model, folder)
            except (Exception, SystemExit) as error:
                row["error"] = str(error) or type(error).__name__
            row["wall_seconds"] = round(time.perf_counter() - began, 1)
            yield row


def missing(rows: list[dict[str, Any]]) -> list[str]:
    """Returns what the rivals can do and no row says anything about, a line for each model and method."""
    done = {(row["model"], row["method"], row["budget"]) for row in rows}
    found = []
    for model in (*tasks.VISION, *tasks.LANGUAGE):
        for name, rival in RIVALS.items():
            variants, bits = rival.of(model)
            for variant in variants:
                left = [f"{b:g}" for b in bits if (model, f"{name} {variant}", f"{b:g}bit") not in done]
                if left:
                    found.append(f"{model}: {name} {variant}, {', '.join(left)} bits")
    return found


def main() -> None:
    """Measures every row that is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = (*tasks.VISION, *tasks.LANGUAGE)
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=list(RIVALS))
    parser.add_argument("--models", nargs="+", default=list(models), choices=models)
    parser.add_argument("--budgets", nargs="+", type=float, help="bits; by default what each rival can do")
    parser.add_argument("--methods", nargs="+", help='of these names only: "auto_quantize, QAT", "uniform" ...')
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for a row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", action="store_true", help="write docs/benchmarks/rivals.md and stop")
    options = parser.parse_args()
    if options.page:
        from tests.benchmarks.rivals import page

        page.write(finished(), missing(finished()))
        return
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for model in options.models:
            for rival in options.rivals:
                done = {key(row) for row in finished() if not (options.retry and "error" in row)}
                limits = {"timeout": options.timeout, "threads": options.threads, "methods": options.methods}
                for row in rows(rival, model, options.budgets, seed, done, **limits):
                    with ROWS.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    shown = (
                        "model",
                        "method",
                        "budget",
                        "kl",
                        "accuracy",
                        "effective_bits",
                        "wall_seconds",
                        "error",
                    )
                    print({name: row[name] for name in shown if name in row}, flush=True)


if __name__ == "__main__":
    main()
