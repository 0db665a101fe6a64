"""`hq-plugin` on two processes over gloo, which each build the float model themselves."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from hq_plugin.artifact import read_info
from hq_plugin.storage import fingerprint
from tests.conftest import TinyNet


def model(out: str) -> TinyNet:
    """What `hq-plugin` calls: random weights, which each process writes down."""
    made = TinyNet()
    (Path(out) / f"weights{os.environ['RANK']}").write_text(fingerprint(made.state_dict()))
    return made


def test_two_processes_begin_with_one_model_and_print_once(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    float_model = ["tests.distributed.test_command_line:model", "--model-arg", f"out={tmp_path}"]
    arguments = [*float_model, "5bit", "--data", "tests.conftest:digits_batches", "--effort", "smoke", "--json"]
    command = [*launch, "-m", "hq_plugin", "quantize", *arguments, "--out", tmp_path / "small"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # Weights that differed would be searched by one process and trained by another.
    assert (tmp_path / "weights0").read_text() == (tmp_path / "weights1").read_text()
    (printed,) = (json.loads(line) for line in done.stdout.splitlines())
    saved = read_info(tmp_path / "small").result
    assert saved is not None
    assert printed["policy"] == saved.policy.to_json()
