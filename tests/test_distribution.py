import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from hq_plugin import ConfigError, DataError, HQWarning, distribution
from hq_plugin.batch import Batch
from hq_plugin.distribution import alive_together, map_split, processes, share_of_batch, warn_if_alone


def test_one_process_has_everything() -> None:
    batch = Batch((torch.arange(5),), {}, None, 5)
    assert share_of_batch(batch) == (batch, 1.0)
    assert map_split(lambda x: x + 1, [1, 2]) == [2, 3]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_shares_make_up_the_batch_and_its_mean(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(10)
    batch = Batch((x,), {"scale": torch.tensor(2.0)}, torch.arange(10), 10)
    parts, mean = [], 0.0
    for index in range(count):
        monkeypatch.setattr(distribution, "processes", lambda index=index: (index, count))
        part, weight = share_of_batch(batch)
        assert part.kwargs["scale"].dim() == 0
        parts.append(part.args[0])
        mean += float(part.args[0].mean()) * weight / count
    assert torch.equal(torch.cat(parts), x)
    assert mean == pytest.approx(float(x.mean()), abs=1e-6)
    with pytest.raises(DataError, match=f"1 samples cannot be split over {count}"):
        share_of_batch(batch.take(1))


def test_a_launch_that_started_one_process_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [sys.executable, "/usr/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "train.py"]
    real = Path.read_bytes
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    warn_if_alone.cache_clear()
    monkeypatch.setattr(
        Path,
        "read_bytes",
        lambda self: "\0".join(words).encode() if self == Path(f"/proc/{os.getppid()}/cmdline") else real(self),
    )
    with pytest.warns(HQWarning, match="2 processes and started one.*torchrun --nproc_per_node 2"):
        warn_if_alone()
    warn_if_alone()  # said once
    words[5] = "1"
    warn_if_alone.cache_clear()
    warn_if_alone()
    warn_if_alone.cache_clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(HQWarning, match="ACCELERATE_USE_CPU=true"):
        warn_if_alone()


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA])
def test_other_ways_to_split_work_are_refused(kind: DistributedType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(ConfigError, match=f"configured for {kind.value}.*data-parallel.*fsdp_version: 2"):
        processes()


def sharding(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Lets accelerate's state say that parameters are sharded."""
    Accelerator()
    plugin = FullyShardedDataParallelPlugin(**options)
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        monkeypatch.setitem(state, "distributed_type", DistributedType.FSDP)
        monkeypatch.setitem(state, "fsdp_plugin", plugin)


def test_the_first_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sharding(monkeypatch, fsdp_version=1, cpu_ram_efficient_loading=False)
    with pytest.raises(ConfigError, match=r"configured for FSDP.*fsdp_version: 2"):
        processes()


def test_weights_in_the_first_process_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sharding(monkeypatch, fsdp_version=2, cpu_ram_efficient_loading=True)
    with pytest.raises(ConfigError, match=r"cpu_ram_efficient_loading.*set it to false"):
        processes()
    sharding(monkeypatch, fsdp_version=2, cpu_ram_efficient_loading=False)
    assert processes() == (0, 1)


def test_one_process_has_nobody_to_lose() -> None:
    with pytest.raises(RuntimeError, match="peer"), alive_together():
        raise RuntimeError("gloo: Connection closed by peer")


#: A program that is in a job, and says at its very end whether it still is.
JOB = """
import atexit, torch.distributed as dist
atexit.register(lambda: print(dist.is_initialized()))
import hq_plugin.distribution
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
"""


@pytest.mark.parametrize(
    ("end", "still"),
    [("", "False"), ("raise SystemExit(2)", "False"), ("raise KeyError", "True")],
    ids=["done", "told", "failed"],
)
def test_a_program_ends_its_part_in_a_job(end: str, still: str) -> None:
    # Or gloo's threads abort one that is done: in 9 of 120 jobs beside others, and in none of 120 so.
    done = subprocess.run([sys.executable, "-c", JOB + end], capture_output=True, text=True)
    assert done.stdout.split() == [still], done.stderr
