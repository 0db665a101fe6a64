"""Where the benchmarks keep what takes long to make: float weights, checkpoints. Git ignores it."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Returns `.cache/benchmarks` in the repository, or the folder that HQ_BENCH_CACHE names; makes it."""
    default = Path(__file__).resolve().parents[2] / ".cache" / "benchmarks"
    path = Path(os.environ.get("HQ_BENCH_CACHE", default))
    path.mkdir(parents=True, exist_ok=True)
    return path
