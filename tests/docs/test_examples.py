"""Every program of docs/examples runs as it stands, and does what it says."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hq_plugin as hq
from hq_plugin.nn import packed_modules

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
#: Those that a test below does not start by itself: the server is started by its client.
STARTED_BY_OTHERS = {"onnxruntime_server.py"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs an example in an empty folder and returns its variables."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield lambda name: runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    torch.set_num_threads(threads)


def test_every_example_is_tested_and_listed() -> None:
    here, listed = Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.name in STARTED_BY_OTHERS or f'"{path.name}"' in here, path.name
        assert f"({path.name})" in listed, path.name


def test_timm(run: Any) -> None:
    found = run("timm_validate.py")
    assert found["before"]["top1"] > 90
    assert found["after"]["top1"] > found["before"]["top1"] - 10
    assert found["small"].hq.effective_bits <= 3


def test_pipeline(run: Any) -> None:
    found = run("huggingface_pipeline.py")
    assert found["after"] == found["before"]
    assert len(found["after"]) > len("The statement")
    assert found["result"].effective_bits <= 4
    assert packed_modules(found["again"].model)


def test_trainer(run: Any) -> None:
    found = run("huggingface_trainer.py")
    assert found["float_accuracy"] > 0.85
    assert found["hybrid_accuracy"] > found["float_accuracy"] - 0.1
    assert len(packed_modules(found["small"])) == len(found["policy"])


def test_lightning(run: Any) -> None:
    pytest.importorskip("lightning")
    found = run("lightning_training.py")
    assert found["before"]["accuracy"] > 0.9
    assert found["after"]["accuracy"] > found["before"]["accuracy"] - 0.08
    assert len(packed_modules(found["small"])) == 3


def test_loop_around_torch_ao(run: Any) -> None:
    found = run("torch_ao_loop.py")
    assert found["accuracy"](found["packed"]) > 0.9
    assert found["difference"] < 1e-5


def test_serving(run: Any) -> None:
    found = run("onnxruntime_serving.py")
    assert found["agreement"] > 0.99
    assert found["accuracy"] > 0.9


def test_several_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = EXAMPLES / "several_processes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    # a file for what each process prints: in one pipe, lines of two processes may run into one another
    command += ["--redirects", "1", "--log-dir", str(tmp_path / "printed")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, program], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    files = (tmp_path / "printed").rglob("stdout.log")
    lines = sorted(line for file in files for line in file.read_text().splitlines() if line.startswith("process "))
    heads, results = zip(*(line.split(": ", 1) for line in lines), strict=True)
    assert heads == ("process 0 of 2", "process 1 of 2")
    assert results[0] == results[1]
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1, stride=2),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(256, 32),
        torch.nn.ReLU(),
        torch.nn.Linear(32, 10),
    )
    assert hq.load(tmp_path / "small", model).hq.effective_bits <= 3  # type: ignore[union-attr]
