import subprocess
import sys
from pathlib import Path

import pytest

from hq_plugin.exclusive import exchange, locked

HOLD = """
import sys
from pathlib import Path
from hq_plugin.exclusive import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_lock_of_another_process(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    path.mkdir() if kind == "directory" else path.write_text("x")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError), locked(path, wait=False):
        pass
    other.kill()  # as a lock of a killed process ends with it
    other.wait()
    with locked(path, wait=False):
        pass
    with locked(path):
        pass


def test_what_cannot_be_locked_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), locked(tmp_path / "nothing"):
        pass


def test_directories_change_places(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    assert exchange(tmp_path / "a", tmp_path / "b") == sys.platform.startswith("linux")
    if sys.platform.startswith("linux"):
        assert (tmp_path / "a" / "file").read_text() == "b"
        assert (tmp_path / "b" / "file").read_text() == "a"
    assert not exchange(tmp_path / "a", tmp_path / "nothing")
