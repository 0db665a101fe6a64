"""How long `import hq_plugin` takes on top of `import torch`.

    python -m tests.benchmarks.imports

Medians over fresh processes, in which torch is imported first; the target is 0.4 s.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

ROUNDS = 9
CODE = """
import time
began = time.perf_counter(); import torch
torch_done = time.perf_counter(); import hq_plugin
print(torch_done - began, time.perf_counter() - torch_done)
"""


def main() -> None:
    """Prints both medians."""
    runs = []
    for _ in range(ROUNDS):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        runs.append([float(part) for part in done.stdout.split()])
    torch_seconds, ours = (statistics.median(column) for column in zip(*runs, strict=True))
    print(f"import torch {torch_seconds:.2f} s, then import hq_plugin {ours:.2f} s, medians of {ROUNDS}")
    print(f"slowest import hq_plugin {max(run[1] for run in runs):.2f} s")


if __name__ == "__main__":
    main()
