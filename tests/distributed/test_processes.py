"""Real processes over gloo, against one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hq_plugin as hq
from tests.distributed.job import Plain


def launch(count: int, out: Path) -> list[dict[str, Any]]:
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.distributed.job", str(out)]
    if count > 1:
        head = ["-m", "torch.distributed.run", "--nproc_per_node", str(count), "--master_port", str(port)]
        command = [sys.executable, *head, *command[1:]]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(1, tmp_path_factory.mktemp("one") / "out")[0]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_reach_what_one_reaches(count: int, alone: dict[str, Any], tmp_path: Path) -> None:
    found = launch(count, tmp_path / "out")
    # Every process has the same model and the same log.
    assert all(report == found[0] for report in found)
    # 30 samples over 4 processes are not split evenly, and still the same mean.
    np.testing.assert_allclose(found[0]["meta"], alone["meta"], rtol=1e-3, atol=1e-4)
    assert found[0]["searched"] == alone["searched"]
    np.testing.assert_allclose(found[0]["scores"], alone["scores"], rtol=1e-2, atol=1e-4)
    assert found[0]["policy"] == alone["policy"]
    np.testing.assert_allclose(found[0]["finetune"], alone["finetune"], rtol=1e-2, atol=1e-4)
    # One process wrote the files, whole.
    loaded = hq.load(tmp_path / "out" / "model", Plain())
    assert loaded.hq.policy.to_json() == alone["policy"]  # type: ignore[union-attr]
