"""Several processes, through accelerate: who does what, and how results come together.

Every process runs the same program with the same seed and reaches the same decisions. Training splits each batch,
scoring splits each generation of policies; what one process found, all are told.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed
from accelerate import Accelerator
from accelerate.utils import gather_object

from hq_plugin.data import Batch
from hq_plugin.errors import DataError, HQWarning

T = TypeVar("T")


def processes() -> tuple[int, int]:
    """Returns the number of this process and how many there are."""
    # Not PartialState, which does not read ACCELERATE_USE_CPU by itself.
    accelerator = Accelerator()
    return accelerator.process_index, accelerator.num_processes


def is_first() -> bool:
    """Whether this process writes files; does not initialise anything."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def wait_for_all() -> None:
    """Waits until every process is here, where there are several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def share_of_batch(batch: Batch) -> tuple[Batch, float]:
    """Returns this process's samples of a batch, and the weight that makes the mean over processes the batch's.

    Raises:
        DataError: The batch has fewer samples than there are processes.
    """
    index, count = processes()
    if count == 1:
        return batch, 1.0
    if batch.size < count:
        raise DataError(
            f"A batch of {batch.size} samples cannot be split over {count} processes. Use larger batches."
        )
    start, stop = batch.size * index // count, batch.size * (index + 1) // count
    return batch.part(start, stop), (stop - start) * count / batch.size


def map_split(function: Callable[[T], Any], items: Sequence[T]) -> list[Any]:
    """Applies a function to every item, each process to its own, and returns all results to all, in order.

    Args:
        function: Its results are sent between processes: plain data.
        items: The same on every process.
    """
    index, count = processes()
    if count == 1:
        return [function(item) for item in items]
    mine = [(number, function(item)) for number, item in enumerate(items) if number % count == index]
    return [result for _, result in sorted(gather_object(mine), key=lambda pair: pair[0])]


def warn_if_alone() -> None:
    """Warns where several processes were asked for and each is alone, as happens on CPUs."""
    if processes()[1] > 1:
        return
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        warnings.warn(
            f"There are {os.environ['WORLD_SIZE']} processes, but accelerate takes each for itself: on CPUs, set "
            "ACCELERATE_USE_CPU=true.",
            HQWarning,
            stacklevel=3,
        )
        return
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return
    if not any(Path(word).name.startswith("accelerate") for word in words):
        return
    for flag, value in itertools.pairwise(words):
        if flag in ("--num_processes", "--num-processes") and value.isdigit() and int(value) > 1:
            warnings.warn(
                f"accelerate launch was asked for {value} processes and started one, as it does with --cpu. "
                f"For several on CPUs: ACCELERATE_USE_CPU=true torchrun --nproc_per_node {value} ..., or mpirun.",
                HQWarning,
                stacklevel=3,
            )
            return
