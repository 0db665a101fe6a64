"""What goes to stdout: lines, JSON and tables; of several processes only the first writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from hq_plugin.budget import format_count


def say(text: object) -> None:
    """Prints a line."""
    from hq_plugin.distribution import is_first

    if is_first():
        print(text)


def say_json(value: Any) -> None:
    """Prints a value as one line of JSON."""
    say(json.dumps(value))


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Prints rows of text under a header."""
    from rich.console import Console
    from rich.table import Table

    from hq_plugin.distribution import is_first

    if not is_first():
        return
    table = Table(*header, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    # Wide enough for a pipe, where rich would assume 80 columns and cut names.
    console = Console()
    Console(width=console.width if sys.stdout.isatty() else 160).print(table)


def print_result(result: Any) -> None:
    """Prints a `Result`: the chosen policy among its baselines, and what of the budget was used."""
    rows = [
        (
            name + (" (chosen)" if name == result.chosen else ""),
            f"{baseline.kl:.4f}",
            "" if baseline.accuracy is None else f"{baseline.accuracy:.4f}",
            f"{baseline.costs.weight_bits:.3f}",
            f"{baseline.costs.size:,}",
            format_count(baseline.costs.bitops),
        )
        for name, baseline in result.baselines.items()
    ]
    rows.append(
        (
            "fine-tuned",
            f"{result.kl:.4f}",
            "" if result.accuracy is None else f"{result.accuracy:.4f}",
            f"{result.effective_bits:.3f}",
            f"{result.size:,}",
            format_count(result.bitops),
        )
    )
    accuracy = "" if result.float_accuracy is None else f"{result.float_accuracy:.4f}"
    rows.append(("float", "0", accuracy, "32", f"{result.float_size:,}", ""))
    print_table(("held-out data", "distance", "accuracy", "effective bits", "bytes", "BitOps"), rows)
    used = ", ".join(f"{share:.1%} of {name}" for name, share in result.used.items())
    say(f"budget {result.budget}: used {used}" if used else f"no budget: {result.budget}")
