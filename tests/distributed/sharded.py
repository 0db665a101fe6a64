"""The job with parameters in pieces: `torchrun --nproc_per_node 2 -m tests.distributed.sharded OUT [DIES]`.

accelerate offers FSDP on accelerators alone, and torch also on CPUs: here accelerate's state is told so.
"""

from __future__ import annotations

import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from tests.distributed import job


def shard(**options: object) -> None:
    """Configures accelerate for FSDP2, with a unit for each part of more than 300 parameters."""
    Accelerator()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="size_based_wrap",
        min_num_params=300,
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        **options,  # type: ignore[arg-type]
    )
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    assert Accelerator().is_fsdp2


if __name__ == "__main__":
    shard()
    job.main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
