"""A real SIGINT at every stage: what is done is kept, the message says how to go on, and going on works."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hq_plugin as hq
from hq_plugin.distillation import RelativeError
from hq_plugin.interruption import deferred, interrupted
from tests.test_checkpoint import OPTIONS, batches, model

#: A stage, the function of ours that runs it, and what its message calls it.
STAGES = {
    "sensitivities": ("additive_sensitivities", "in sensitivities"),
    "meta-training": ("meta_train_network", "in meta-training, after step 3 of 8"),
    "search": ("genetic_search", "in search"),
    "fine-tuning": ("finetune_network", "in fine-tuning, after step 3 of 6"),
}


def inside(function: str) -> bool:
    """Whether a function of this name is being called."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame.f_code.co_name == function


class Interrupting:
    """A loss that presses Ctrl-C when it is computed for the third time in a stage, or in its third step."""

    def __init__(self, function: str) -> None:
        self.function, self.calls = function, 0

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        self.calls += inside(self.function) and not inside("batch_statistics_pay")
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return RelativeError([teacher])(student, teacher)


def job(directory: str, out: str) -> None:
    """Is interrupted at every stage, and goes on."""
    torch.set_num_threads(1)
    for function, _ in STAGES.values():
        try:
            hq.quantize(
                model(), "3.5bit", batches(), loss=Interrupting(function), checkpoint_dir=directory, **OPTIONS
            )  # type: ignore[arg-type]
        except KeyboardInterrupt as error:
            print(error, flush=True)
    small = hq.quantize(model(), "3.5bit", batches(), loss=Interrupting(""), checkpoint_dir=directory, **OPTIONS)  # type: ignore[arg-type]
    hq.save(small, out)


def run(*command: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-W", "ignore", *map(str, command)]
    return subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=250
    )


def test_every_stage_is_kept_and_goes_on(tmp_path: Path) -> None:
    code = "import sys; from tests.test_interruption import job; job(*sys.argv[1:])"
    ended = run("-c", code, tmp_path / "ck", tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    for line, (_, says) in zip(lines, STAGES.values(), strict=True):
        assert line.startswith(f"Interrupted {says}")
        assert line.endswith(f"is kept in {tmp_path / 'ck'}; the same call goes on from there.")
    # Between steps it is waited for, and that is said; in scoring it is not.
    assert ended.stderr.count("this step is finished and kept") == 2
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plain = hq.quantize(model(), "3.5bit", batches(), loss=Interrupting(""), **OPTIONS)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)
    resumed = hq.load(tmp_path / "out", model())
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in resumed.state_dict().items())
    assert resumed.hq.policy == plain.hq.policy  # type: ignore[union-attr]


class InterruptingData:
    """Batches that press Ctrl-C when meta-training reads the third of them."""

    def __init__(self) -> None:
        self.data, self.reads = batches(), 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.data:
            self.reads += inside("meta_train_network")
            if self.reads == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


@pytest.mark.parametrize("kept", [True, False])
def test_the_command_line_says_it_in_one_line(kept: bool, tmp_path: Path) -> None:
    arguments = ["-m", "hq_plugin", "quantize", "tests.test_checkpoint:model", "3bit", "--effort", "smoke"]
    arguments += ["--data", "tests.test_interruption:InterruptingData", "--out", str(tmp_path / "out")]
    ended = run(*arguments, *(["--checkpoint-dir", str(tmp_path / "ck")] if kept else []))
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    says = "is kept in" if kept else "Interrupted. With --checkpoint-dir the same command goes on from there."
    assert says in last
    assert not (tmp_path / "out").exists()


def test_the_second_time_stops_at_once() -> None:
    with deferred() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.wanted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_handlers_of_others_are_left_alone() -> None:
    seen = []
    previous = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with deferred() as asked:
            os.kill(os.getpid(), signal.SIGINT)
        assert seen == [1]
        assert not asked.wanted
    finally:
        signal.signal(signal.SIGINT, previous)
    worker = threading.Thread(target=lambda: deferred().__enter__())
    worker.start()
    worker.join()
    assert signal.getsignal(signal.SIGINT) is previous


def test_without_a_checkpoint_the_message_says_what_would_have_kept_it() -> None:
    assert "checkpoint_dir=... keeps what is done" in str(interrupted("search", None))
