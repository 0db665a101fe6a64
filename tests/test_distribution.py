import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

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


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_ways_that_split_the_model_are_refused(kind: DistributedType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(ConfigError, match=f"configured for {kind.value}.*data-parallel"):
        processes()


def test_one_process_has_nobody_to_lose() -> None:
    with pytest.raises(RuntimeError, match="peer"), alive_together():
        raise RuntimeError("gloo: Connection closed by peer")
