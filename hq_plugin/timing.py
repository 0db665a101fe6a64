"""How long a call takes, and on what machine. What is timed is decided in `kernels.py` and `profiling.py`."""

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
#: Seconds for which short calls are repeated: of one of many layers, and of a whole model. Of the latter's medians
#: the standard deviation was 36 % after 0.02 s on a machine that did something else as well, and 6 % after 0.3 s.
_SECONDS, MODEL_SECONDS = 0.02, 0.3
#: Instructions that Linux may say a processor has, and kernels for few bits ask for. Hosts rent out processors of
#: several generations under one name ("AMD EPYC"), on which the same kernel differs by a factor.
_INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")
#: Bytes, beyond which a cache is as empty as it gets.
_MOST_OTHER = 1 << 26


def median_milliseconds(
    call: Callable[[], Any], before: Callable[[], Any] = lambda: None, seconds: float = _SECONDS
) -> float:
    """Returns the median wall time of a call, after some to warm up; an accelerator is waited for.

    Args:
        call: What is timed.
        before: Called before each, and not timed.
        seconds: For how long it is repeated at least, unless it is very short.
    """
    for _ in range(_WARM_UP):
        call()
    times: list[float] = []
    while len(times) < _REPEATS or (sum(times) < seconds and len(times) < _MOST_REPEATS):
        before()
        _wait()
        began = time.perf_counter()
        call()
        _wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


class OtherMemory:
    """Memory that is read between two runs of a part of a model, in place of the rest of it.

    A layer that runs alone, again and again, finds its weight in the processor's cache. In a model it finds there
    what the other layers left of it, and the kernel with the fewest bytes gains most.

    Args:
        size: Bytes that the rest of the model reads; a power of two up to 64 MiB is taken.
        device: Where the model is.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = min(1 << max(size, 1).bit_length(), _MOST_OTHER)
        self._memory = torch.zeros(self.size // 4, dtype=torch.int32, device=device)

    def read(self) -> None:
        """Reads it, in every thread a part."""
        self._memory.sum()


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def machine(device: torch.device | None = None) -> str:
    """Returns what a measurement is for: processor and its instructions, threads and version of torch.

    Args:
        device: Where it ran, which is named where that is not the processor.
    """
    on = "" if device is None or device.type == "cpu" else f", on {device_name(device)}"
    return f"{platform.machine()}, {_cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}{on}"


def device_name(device: torch.device) -> str:
    """Returns what tells devices of different speed apart."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform()
    return cpu_name(lines)


def cpu_name(lines: list[str]) -> str:
    """Returns the name of the first processor of Linux's cpuinfo, and its instructions for few bits.

    On Arm there is no name, and "flags" are called "Features".
    """
    said = {name.strip(): value.split() for name, _, value in (line.partition(":") for line in reversed(lines))}
    has = {*said.get("flags", []), *said.get("Features", [])}
    found = [*said.get("model name", []), *(name for name in _INSTRUCTIONS if name in has)]
    return " ".join(found)
