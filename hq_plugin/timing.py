"""How long a call takes, and on what machine. What is timed is decided in `kernels.py` and `profiles.py`."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: Calls to warm up, and calls of which the median is taken: at least so many, more of short ones.
_WARM_UP, _REPEATS, _MOST_REPEATS = 3, 15, 200
#: Seconds for which short calls are repeated.
_SECONDS = 0.02


def median_milliseconds(call: Callable[[], Any]) -> float:
    """Returns the median wall time of a call, after some to warm up; an accelerator is waited for."""
    for _ in range(_WARM_UP):
        call()
    times: list[float] = []
    while len(times) < _REPEATS or (sum(times) < _SECONDS and len(times) < _MOST_REPEATS):
        _wait()
        began = time.perf_counter()
        call()
        _wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def machine() -> str:
    """Returns what a measurement is for: processor, threads and version of torch."""
    return f"{platform.machine()}, {_cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def device_name(device: torch.device) -> str:
    """Returns what tells devices of different speed apart."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
