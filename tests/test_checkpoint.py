"""Killed at random moments and started again, the same call reaches the same bits."""

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hq_plugin as hq
from hq_plugin import ArtifactError, ArtifactPathError, Config, ConfigError, HQWarning, training
from hq_plugin.checkpoint import Checkpoint
from hq_plugin.preparation import decisive
from tests.conftest import TinyNet

OPTIONS = {
    "effort": "smoke",
    "meta_steps": 8,
    "finetune_steps": 6,
    "search_evaluations": 16,
    "activation_bits": (4, 8),
    "progress": False,
}


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 1, 8, 8, generator=generator) for _ in range(8)]


def model() -> nn.Module:
    torch.manual_seed(0)
    return TinyNet().eval()


JOB = """
import sys, torch
torch.set_num_threads(1)
import hq_plugin as hq
from tests.test_checkpoint import OPTIONS, batches, model
small = hq.quantize(model(), "3.5bit", batches(), checkpoint_dir=sys.argv[1], checkpoint_seconds=0, **OPTIONS)
hq.save(small, sys.argv[2], overwrite=True)
"""


def _kept_more(job: subprocess.Popen, directory: Path, changes: int) -> bool:
    """Waits until the checkpoint has changed so often; False if the job has ended before."""

    def kept() -> list[tuple[str, int, int]]:
        with contextlib.suppress(FileNotFoundError):  # a state is put in another's place
            stats = [(str(path), path.stat()) for path in directory.rglob("*")]
            return [(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats]
        return []

    seen = kept()
    while changes and job.poll() is None:
        time.sleep(0.005)
        now = kept()
        changes -= now != seen
        seen = now
    return job.poll() is None


@pytest.mark.parametrize(
    "most", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])], ids=["3 kills", "20 kills"]
)
def test_killed_at_random_moments_it_reaches_the_same_bits(most: int, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = hq.quantize(model(), "3.5bit", batches(), **OPTIONS)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)
    rng, kills, env = random.Random(0), 0, {**os.environ, "OMP_NUM_THREADS": "1"}
    while True:
        job = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", JOB, str(tmp_path / "ck"), str(tmp_path / "out")], env=env
        )
        # A random amount of its work later it dies; counted in what it has kept, not in seconds.
        if kills < most and _kept_more(job, tmp_path / "ck", rng.randint(1, 12 if most < 20 else 4)):
            time.sleep(rng.uniform(0, 0.05))
            job.kill()
            kills += 1
        if job.wait() == 0:
            break
        assert job.returncode == -signal.SIGKILL
    assert kills > most // 4, "it was killed before it ended"
    found = hq.load(tmp_path / "out", model())
    assert found.hq.policy == expected.hq.policy  # type: ignore[union-attr]
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    assert found.hq.kl == expected.hq.kl  # type: ignore[union-attr]


def test_a_finished_checkpoint_computes_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (model(), "3.5bit", batches())
    first = hq.quantize(*arguments, checkpoint_dir=tmp_path / "ck", **OPTIONS)  # type: ignore[arg-type]
    lines = (tmp_path / "ck" / "scores.jsonl").read_text()

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("trained or scored again")

    monkeypatch.setattr("torch.optim.Adam.step", fail)
    again = hq.quantize(*arguments, checkpoint_dir=tmp_path / "ck", **OPTIONS)  # type: ignore[arg-type]
    assert (tmp_path / "ck" / "scores.jsonl").read_text() == lines
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert again.hq.history["finetune"] == first.hq.history["finetune"]  # type: ignore[union-attr]


def test_a_torn_score_is_scored_again(tmp_path: Path) -> None:
    arguments = (model(), "3.5bit", batches())
    first = hq.quantize(*arguments, checkpoint_dir=tmp_path / "ck", **OPTIONS)  # type: ignore[arg-type]
    log = tmp_path / "ck" / "scores.jsonl"
    text = log.read_text()
    log.write_text(text[: len(text) // 2])
    again = hq.quantize(*arguments, checkpoint_dir=tmp_path / "ck", **OPTIONS)  # type: ignore[arg-type]
    assert again.hq.policy == first.hq.policy  # type: ignore[union-attr]
    records = [line for line in log.read_text().splitlines() if line.endswith("}")]
    assert {json.loads(line)["of"] for line in records} == {json.loads(line)["of"] for line in text.splitlines()}


def test_a_checkpoint_of_other_work_is_refused(tmp_path: Path) -> None:
    hq.quantize(model(), "3.5bit", batches(), checkpoint_dir=tmp_path / "ck", **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="other work: seed differ"):
        hq.quantize(model(), "3.5bit", batches(), checkpoint_dir=tmp_path / "ck", seed=1, **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="budget differ"):
        hq.quantize(model(), "4bit", batches(), checkpoint_dir=tmp_path / "ck", **OPTIONS)  # type: ignore[arg-type]
    other = model()
    with torch.no_grad():
        other.head.bias += 1
    with pytest.raises(ArtifactError, match="float model differ"):
        hq.quantize(other, "3.5bit", batches(), checkpoint_dir=tmp_path / "ck", **OPTIONS)  # type: ignore[arg-type]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactPathError, match=r"something else \(thesis.txt\)"):
        hq.quantize(model(), "3.5bit", batches(), checkpoint_dir=tmp_path / "full", **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="checkpoint_seconds"):
        hq.Config(checkpoint_seconds=-1)


def test_a_damaged_state_is_an_error(tmp_path: Path) -> None:
    hq.quantize(model(), "3.5bit", batches(), checkpoint_dir=tmp_path / "ck", **OPTIONS)  # type: ignore[arg-type]
    for file in (tmp_path / "ck").glob("*/model.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        hq.quantize(model(), "3.5bit", batches(), checkpoint_dir=tmp_path / "ck", **OPTIONS)  # type: ignore[arg-type]


def test_other_data_is_warned_of_and_another_lambda_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    first, second = ([torch.randn(16, 8) * scale for _ in range(8)] for scale in (1, 3))
    options: Any = {"effort": "smoke", "progress": False, "checkpoint_dir": tmp_path / "work"}
    hq.quantize(model, "4bit", first, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hq.quantize(model, "4bit", first, **options)
    with pytest.warns(HQWarning, match="begun with other data"):
        hq.quantize(model, "4bit", second, **options)
    options["checkpoint_dir"] = tmp_path / "other"
    hq.quantize(model, "4bit", first, loss=lambda s, t: (s - t).abs().mean(), **options)
    with pytest.raises(hq.ArtifactError, match="loss"):
        hq.quantize(model, "4bit", first, loss=lambda s, t: (s - t).square().mean(), **options)


def scaled(student: Any, teacher: Any, by: float) -> Any:
    return by * (student - teacher).square().mean()


def test_functions_of_one_factory_are_told_apart() -> None:
    def made(by: float) -> Any:
        return lambda student, teacher: by * (student - teacher).square().mean()

    def known(loss: Any) -> Any:
        return decisive(Config(loss=loss))["loss"]

    assert known(made(1.0)) == known(made(1.0)) != known(made(2.0))
    first, again, other = (functools.partial(scaled, by=by) for by in (1.0, 1.0, 2.0))
    assert known(first) == known(again) != known(other)


def test_an_error_inside_is_not_taken_for_another_process(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), Checkpoint(tmp_path / "work", {}, 60.0).held():
        raise BlockingIOError


class Counting(torch.utils.data.Dataset):
    """Samples, and how often one was read."""

    def __init__(self) -> None:
        self.samples, self.reads = torch.cat(batches()), 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.reads += 1
        return self.samples[index]


def test_a_finished_stage_reads_no_data_again(tmp_path: Path) -> None:
    data, options = Counting(), {**OPTIONS, "batch_size": 16, "meta_steps": 30}
    first = hq.quantize(model(), "3.5bit", data, checkpoint_dir=tmp_path / "ck", **options)
    reads, states = data.reads, {path: path.stat().st_mtime_ns for path in (tmp_path / "ck").iterdir()}
    data.reads = 0
    again = hq.quantize(model(), "3.5bit", data, checkpoint_dir=tmp_path / "ck", **options)
    assert data.reads < reads - 30 * 16
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "ck").iterdir() if path.is_dir()}
    assert len(kept) == 2
    assert all(states[path] == time for path, time in kept.items())
    x = batches()[0]
    assert torch.equal(first(x), again(x))


def test_scores_are_of_the_network_that_a_loop_of_the_users_trained(tmp_path: Path) -> None:
    options = {**OPTIONS, "meta_steps": 0}
    session = hq.meta_train(model(), batches(), checkpoint_dir=tmp_path / "ck", **options)
    before = [record["score"] for record in session.search("3.5bit").history]
    assert [record["score"] for record in session.search("3.5bit").history] == before
    with torch.no_grad():
        session.network.head._parameters["weight"].mul_(0.5)
    assert session.search("3.5bit").history[0]["score"] > 2 * before[0]


def test_work_in_another_precision_or_beside_a_session_is_other_work(tmp_path: Path) -> None:
    made = hq.preparation.open_checkpoint
    data, config = hq.data.prepare_data(batches(), model(), Config().filled()), Config().filled()

    def opened(name: str, session: str | None = None) -> None:
        made(model(), data, Config(checkpoint_dir=tmp_path / name).filled(), None, session=session)

    assert config.checkpoint_dir is None
    opened("mixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.Accelerator.mixed_precision", "bf16")
        with pytest.raises(ArtifactError, match="other work: mixed precision differ"):
            opened("mixed")
    opened("session", session="0123")
    with pytest.raises(ArtifactError, match="other work: session differ"):
        opened("session")


def test_a_process_on_a_host_that_does_not_share_the_directory_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hq_plugin.checkpoint.in_first", lambda claim: None)  # it ran elsewhere
    with pytest.raises(ArtifactPathError, match="all hosts share"):
        Checkpoint(tmp_path / "kept", {"seed": 0})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_resumed_training_goes_on_alike_whatever_the_layout_of_weights(
    layout: torch.memory_format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)).eval()
    net = net.to(memory_format=layout)  # type: ignore[call-overload]
    net[4].weight.data = net[4].weight.data.t().contiguous().t()
    options: dict[str, Any] = {**OPTIONS, "meta_steps": 0, "finetune_steps": 12, "checkpoint_seconds": 0}
    whole = hq.quantize(net, "4bit", batches(), **options)

    step = training._Run.step

    def dying(run: Any, number: int, value: float) -> None:
        if run.task.name == "fine-tuning" and number == 6:
            raise KeyboardInterrupt
        step(run, number, value)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            hq.quantize(net, "4bit", batches(), checkpoint_dir=tmp_path, **options)
    again = hq.quantize(net, "4bit", batches(), checkpoint_dir=tmp_path, **options)
    losses = [[entry["loss"] for entry in small.hq.history["finetune"]] for small in (whole, again)]  # type: ignore[union-attr]
    assert losses[0] == losses[1]
