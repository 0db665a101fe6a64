"""Memory and loading of SmolLM2: what the benchmark `deployment` measures in fresh processes.

    python -m tests.benchmarks.deployment_loading FOLDER from_pretrained|load [TINY]

is such a process: it reads and then loads what was saved in FOLDER, once each, and prints a JSON object. If TINY is
given, that small model is loaded before: transformers and timm then have their modules imported and their tables
built.

Modules are imported from bytecode, which pip writes when it installs a package: a process that is not counted
writes that of a checkout.

"Reading its bytes into float tensors" is `safetensors.torch.load_file` and `.float()` on each stored tensor, packed
bytes included. "Dequantizing" turns the packed weights into the float weights that they stand for, what a loader
without packed layers has to do.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import hq_plugin
from hq_plugin.nn import cache_weights, packed_modules

#: Processes of each kind.
PROCESSES = 5


def resident() -> int:
    """Returns the bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def timed(call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Returns seconds on the clock and of the processors, and what a call returned."""
    gc.collect()
    began, worked = time.perf_counter(), time.process_time()
    made = call()
    return {"": time.perf_counter() - began, " cpu": time.process_time() - worked}, made


@torch.no_grad()
def one_process(folder: str, door: str, tiny: str | None = None) -> dict[str, float]:
    """Reads, loads, runs and dequantizes."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401, its class is found by name

    def load(path: str) -> Any:
        if door == "load":
            return hq_plugin.load(path)
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    if tiny is not None:
        load(tiny)
    before = resident()
    read, floats = timed(
        lambda: {name: tensor.float() for name, tensor in load_file(f"{folder}/model.safetensors").items()}
    )
    del floats
    loaded, model = timed(lambda: load(folder))
    cache_weights(model, False)
    model(torch.tensor([[1, 2, 3]]))
    gc.collect()
    found = {"resident bytes": float(resident() - before), "load / read": loaded[""] / read[""]}
    dequantized, _ = timed(lambda: [layer.weight for layer in packed_modules(model).values()])
    for name, seconds in (("read", read), ("load", loaded), ("dequantize", dequantized)):
        found |= {f"{name}{clock}": value for clock, value in seconds.items()}
    return found


def measure(folder: Path, door: str, *tiny: Path) -> dict[str, float]:
    """Returns medians over fresh processes, after one that writes bytecode where there is none."""
    command = [sys.executable, "-m", "tests.benchmarks.deployment_loading", str(folder), door, *map(str, tiny)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    runs = []
    for _ in range(1 + PROCESSES):
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        runs.append(json.loads(out.stdout.splitlines()[-1]))
    runs = runs[1:]
    return {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(one_process(*sys.argv[1:])))
