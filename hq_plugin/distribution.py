"""Several processes, through accelerate: who does what, and how results come together.

Every process runs the same program with the same seed and reaches the same decisions. Training splits each batch,
scoring splits each generation of policies; what one process found, all are told.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from hq_plugin.errors import ConfigError, DataError, HQError, HQWarning, TrainingError

if TYPE_CHECKING:
    from hq_plugin.batch import Batch

T = TypeVar("T")
#: Ways to run in which each process holds the whole model. Where it is in pieces, FSDP2 is the one that can be had.
_WHOLE = {kind for kind in DistributedType if kind.value.startswith(("NO", "MULTI_"))}
#: The module of tensors that are spread over processes. It takes a second to import.
_DTENSORS = "torch.distributed.tensor"
#: Seconds in which gloo's threads let go of what the last collective sent. Groups end and join theirs, but torch's
#: caches of such tensors keep groups past that: without a pause half of the jobs whose last collective had just
#: come back were aborted, with 0.02 s none.
_LETTING_GO = 0.1
#: What collectives say when the process at the other end is gone.
_GONE = re.compile(r"gloo|nccl|ProcessGroup|connection (closed|reset) by (remote )?peer|broken pipe", re.IGNORECASE)


def processes() -> tuple[int, int]:
    """Returns the number of this process and how many there are."""
    # Not PartialState, which does not read ACCELERATE_USE_CPU by itself.
    accelerator = Accelerator()
    if accelerator.distributed_type not in _WHOLE and not accelerator.is_fsdp2:
        raise ConfigError(
            f"accelerate is configured for {accelerator.distributed_type.value}, which hq_plugin does not know. "
            "Configure data-parallel training (MULTI_GPU or MULTI_CPU), or, for a model that no device holds "
            "whole, FSDP with fsdp_version: 2."
        )
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "accelerate is configured to load a model in the first process only (fsdp_cpu_ram_efficient_loading). "
            "hq_plugin plans with the whole model in each process's memory: set it to false."
        )
    return accelerator.process_index, accelerator.num_processes


def in_job() -> bool:
    """Whether this process is one of a job's; does not initialise anything."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leave() -> None:
    """Ends this process's part in the job, where it has one."""
    if not in_job():
        return
    gloo = torch.distributed.get_backend() == "gloo"
    torch.distributed.destroy_process_group()
    if gloo and _DTENSORS in sys.modules:
        time.sleep(_LETTING_GO)


@atexit.register
def _leave_gloo() -> None:
    """Leaves where a program ends without: gloo's threads may otherwise abort a process that has done all.

    They let go of what the last collective sent when they come to it, and need the interpreter for that. With NCCL
    all end together, so that it is for the program to do. After an error the others may never come.
    """
    if in_job() and torch.distributed.get_backend() == "gloo" and not hasattr(sys, "last_value"):
        leave()


def in_pieces(tensor: torch.Tensor) -> bool:
    """Whether a tensor is spread over processes (a DTensor)."""
    # Whoever has one has imported it.
    module = sys.modules.get(_DTENSORS)
    return module is not None and isinstance(tensor, module.DTensor)


def is_first() -> bool:
    """Whether this process writes files; does not initialise anything."""
    return not in_job() or torch.distributed.get_rank() == 0


def wait_for_all() -> None:
    """Waits until every process is here, where there are several."""
    if in_job():
        with alive_together():
            torch.distributed.barrier()


def lost_process(error: BaseException) -> bool:
    """Whether an error says that another process of the job is gone."""
    return in_job() and isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None


@contextmanager
def alive_together() -> Iterator[None]:
    """Inside, the loss of another process is said in words that help.

    Raises:
        TrainingError: Another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, HQError) or not lost_process(error):
            raise
        rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
        raise TrainingError(
            f"Another of the {count} processes has ended, and process {rank} cannot go on without it. The "
            "launcher's last lines name it (root cause). Start the same command again; with checkpoint_dir=... it "
            "goes on from what was kept."
        ) from error


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


def map_split(function: Callable[[T], Any], items: Sequence[T], evenly: bool = False) -> list[Any]:
    """Applies a function to every item, each process to its own, and returns all results to all, in order.

    Args:
        function: Its results are sent between processes: plain data.
        items: The same on every process.
        evenly: Whether every process must call it as often as the others, because it gathers what they have: one
            that has too few items does some of the others' again.
    """
    index, count = processes()
    if count == 1:
        return [function(item) for item in items]
    mine = [(number, function(item)) for number, item in enumerate(items) if number % count == index]
    if evenly and len(items) % count and index >= len(items) % count:
        function(items[-1])
    return [result for _, result in sorted(gather_object(mine), key=lambda pair: pair[0])]


def in_first(function: Callable[[], T]) -> T:
    """Calls a function in the first process alone, and returns what it returned, or raises what it raised, in all.

    Does not initialise anything.

    Args:
        function: Its result is sent between processes: plain data.
    """
    if not in_job():
        return function()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = function()
        except Exception as error:  # whatever it is: the others wait for it
            outcome[1] = error
    with alive_together():
        torch.distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


@functools.cache
def warn_if_alone() -> None:
    """Warns, once, where several processes were asked for and each is alone, as happens on CPUs."""
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
