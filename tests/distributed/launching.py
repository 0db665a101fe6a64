"""Starting the job of these tests: on one machine, or in network namespaces that stand for hosts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
MODULE = "tests.distributed.job"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def alone(*arguments: object) -> list[str]:
    """Returns the command that runs the job in one process."""
    return [sys.executable, "-m", MODULE, *map(str, arguments)]


def torchrun(count: int, *arguments: object, module: str = MODULE, **options: object) -> list[str]:
    """Returns the command that starts processes; options are torchrun's."""
    named = {"nproc_per_node": count, "master_port": free_port(), **options}
    flags = [f"--{name}={value}" for name, value in named.items()]
    return [sys.executable, "-m", "torch.distributed.run", *flags, "-m", module, *map(str, arguments)]


def run(command: list[str], limit: float = 280, **environment: str) -> subprocess.CompletedProcess[str]:
    env = ENVIRONMENT | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=limit)


def reports(out: Path, count: int) -> list[dict[str, Any]]:
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(count)]
