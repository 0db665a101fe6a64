"""What goes to stdout: lines, JSON and tables; of several processes only the first writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from hq_plugin.budget import LIMITS, format_count


def say(text: object) -> None:
    """Prints a line."""
    from hq_plugin.distribution import is_first

    if is_first():
        print(text)


def say_json(value: Any) -> None:
    """Prints a value as one line of JSON, in which a number that is not finite is null."""
    from hq_plugin.report.document import finite

    say(json.dumps(finite(value)))


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Prints rows of text under a header, without columns that nobody has a value for."""
    from rich.console import Console
    from rich.table import Table

    from hq_plugin.distribution import is_first

    if not is_first():
        return
    shown = [n for n in range(len(header)) if any(row[n] for row in rows)]
    table = Table(*(header[n] for n in shown), box=None, header_style="bold")
    for row in rows:
        table.add_row(*(row[n] for n in shown))
    # Wide enough for a pipe, where rich would assume 80 columns and cut names.
    console = Console()
    Console(width=console.width if sys.stdout.isatty() else 160).print(table)


def print_result(result: Any) -> None:
    """Prints a `Result`: the chosen policy among its baselines, and what of the budget was used."""
    rows = [
        (
            name + (" (chosen)" if name == result.chosen else ""),
            _number(baseline.kl),
            _share(baseline.accuracy),
            f"{baseline.costs.weight_bits:.3f}",
            f"{baseline.costs.size:,}",
            format_count(baseline.costs.bitops),
        )
        for name, baseline in result.baselines.items()
    ]
    rows.append(
        (
            "fine-tuned",
            _number(result.kl),
            _share(result.accuracy),
            f"{result.effective_bits:.3f}",
            f"{result.size:,}",
            format_count(result.bitops),
        )
    )
    rows.append(("float", "0", _share(result.float_accuracy), "32", f"{result.float_size:,}", ""))
    header = ("held-out data", "distance", "accuracy", "effective bits", "bytes", "BitOps")
    print_table(header, rows)
    used = ", ".join(f"{share:.1%} of {LIMITS.get(name, name)}" for name, share in result.used.items())
    if _is_widest(result) and result.used and max(result.used.values()) < 0.97:
        say("Every layer has its widest width: a smaller budget would be kept as well.")
    say(f"budget {result.budget}: used {used}" if used else f"no budget: {result.budget}")


def _is_widest(result: Any) -> bool:
    """Whether every layer has its widest width, as far as the result knows what it might choose."""
    return bool(result.sensitivities) and all(
        result.policy[site].weight >= max(group.weight_bits)
        and result.policy[site].activation >= max(group.activation_bits)
        for group in result.sensitivities
        for site in group.sites
    )


def _number(value: float) -> str:
    return f"{value:#.3g}" if value else "0"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
