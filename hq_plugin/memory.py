"""Memory of this process: the most that was in use, in bytes, on any system, and whether an error means too little.

Operating systems count a peak since the process began, so that a stage can only add to it.
"""

from __future__ import annotations

import sys

import torch
from accelerate.utils.memory import should_reduce_batch_size


def peak_memory() -> dict[str, int]:
    """Returns the most bytes that were in use at once so far.

    Returns:
        `"process"`, resident memory of the process, everything in it counted; `"cuda"`, tensors on the current
        GPU, where there is one and it was used. What the system does not tell is left out.
    """
    peaks = {"process": _resident_peak()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks["cuda"] = torch.cuda.max_memory_allocated()
    return {name: count for name, count in peaks.items() if count}


def _resident_peak() -> int:
    try:
        import resource
    except ImportError:  # Windows; psutil comes with accelerate
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)  # kibibytes everywhere but on macOS


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was too little, on a GPU or a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return bool(error.args) and isinstance(error.args[0], str) and should_reduce_batch_size(error)
