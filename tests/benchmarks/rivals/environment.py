"""An environment for each rival, made from the requirements pinned in `<rival>.txt`."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

CACHE = Path(os.environ.get("HQ_RIVALS_CACHE", ".cache/rivals"))
HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]


def python_of(rival: str) -> Path:
    """Returns the interpreter of a rival's environment, which is made if it is missing or its pins changed.

    Raises:
        RuntimeError: pip could not install what is pinned; says why.
    """
    folder = CACHE / rival
    pins = (HERE / f"{rival}.txt").read_text()
    stamp, python = folder / "pins.txt", folder / "bin" / "python"
    if stamp.exists() and stamp.read_text() == pins:
        return python
    print(f"{rival}: making its environment in {folder}", flush=True)
    venv.create(folder, with_pip=True, clear=folder.exists())
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "-r", str(HERE / f"{rival}.txt")], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip: {reason(done.stderr)}")
    stamp.write_text(pins)
    return python


def run(rival: str, task: Path, timeout: float, threads: int) -> None:
    """Runs a rival's script on a task folder, in its environment.

    Raises:
        RuntimeError: It failed, or took longer than `timeout` seconds; says why, and where its output is.
    """
    python = python_of(rival)
    # As modules of this repository: beside a script, a file `modelopt.py` would hide the package.
    module = next(HERE.glob(f"{rival}*.py")).stem
    command = [str(python.absolute()), "-m", f"tests.benchmarks.rivals.{module}", str(task.absolute())]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONPATH", None)
    with (task / "log.txt").open("w") as log:
        try:
            done = subprocess.run(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                env=environment,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {timeout:.0f} s") from None
    if done.returncode:
        raise RuntimeError(reason((task / "log.txt").read_text()) or f"exit status {done.returncode}")


def reason(output: str) -> str:
    """Returns the line of a process's output that says why it failed: the last exception, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [
        line for line in lines if line.split(":")[0].rpartition(".")[2].endswith(("Error", "Exception", "ERROR"))
    ]
    return (named or lines or [""])[-1][:400]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(python_of(name))
