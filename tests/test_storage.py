"""Files appear whole or not at all: full disks, lost permissions, kills, and two writers at once."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import hq_plugin as hq
from hq_plugin import ArtifactError, ArtifactPathError, ExportError, HQWarning, storage
from hq_plugin.checkpoint import Checkpoint
from hq_plugin.storage import read_json, read_tensors, sealed, write_bytes, write_directory
from tests.test_checkpoint import OPTIONS, batches, model

KIND = "test"
#: Bytes of a file of the disk that is full: more than an empty file, less than any of ours.
ROOM = 512


def save(directory: Path, value: int, size: int = 4096) -> None:
    write_directory(directory, KIND, 1, {"value": value}, {"x": torch.full((size,), value)}, overwrite=True)


def value_of(directory: Path) -> int:
    content = read_json(directory, KIND, 1)
    (value,) = read_tensors(directory, content["sha256"])["x"].unique().tolist()
    assert value == content["value"]
    return int(value)


@contextmanager
def full_disk() -> Iterator[None]:
    """Inside, no file can grow beyond a few bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_permission(directory: Path) -> Iterator[None]:
    """Inside, nothing can be written there; root's permission is taken by a file in the directory's place."""
    aside = directory.with_name("aside")
    directory.rename(aside)
    directory.write_text("")
    try:
        yield
    finally:
        directory.unlink()
        aside.rename(directory)


@pytest.fixture(scope="module")
def session() -> hq.Session:
    return hq.meta_train(model(), batches(), **OPTIONS)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def small(session: hq.Session) -> nn.Module:
    return session.quantize("3.5bit")


Writer = Callable[[Path], object]


@pytest.fixture(params=["model", "session", "profile", "export"])
def writer(request: pytest.FixtureRequest, session: hq.Session, small: nn.Module) -> Writer:
    profile = hq.Profile("torch", 1, "m" * ROOM, "", {}, 0.0, {}, 0.0, {})
    writers: dict[str, Writer] = {
        "model": lambda place: hq.save(small, place, overwrite=True),
        "session": lambda place: session.save(place, overwrite=True),
        "profile": profile.save,
        "export": lambda place: hq.export(small, place, batches()[0]),
    }
    return writers[request.param]


def everything(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def test_a_full_disk_and_a_lost_permission_leave_the_old(writer: Writer, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises((ArtifactPathError, ExportError, OSError), match="too large"), full_disk():
        writer(place / "saved")
    assert everything(place) == {}
    assert list(place.iterdir()) == []
    writer(place / "saved")
    before = everything(place)
    assert before
    with pytest.raises((ArtifactPathError, ExportError, OSError), match="too large"), full_disk():
        writer(place / "saved")
    assert everything(place) == before
    with pytest.raises((ArtifactPathError, ExportError, OSError)), no_permission(place):
        writer(place / "saved")
    assert everything(place) == before
    writer(place / "saved")
    assert everything(place).keys() == before.keys(), "and nothing else was left"


def test_a_full_disk_does_not_cost_the_work(tmp_path: Path) -> None:
    plain = hq.quantize(model(), "3.5bit", batches(), **OPTIONS)  # type: ignore[arg-type]
    kept = {**OPTIONS, "checkpoint_dir": tmp_path / "ck", "checkpoint_seconds": 0}
    # The first file is small enough; states and scores are not.
    with pytest.warns(HQWarning, match="could not be kept") as said, limited_to(tmp_path / "ck", 4096):
        small = hq.quantize(model(), "3.5bit", batches(), **kept)  # type: ignore[arg-type]
    assert len(said) == 1, "said once"
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in small.state_dict().items())
    # What is there is whole: going on with it gives the same.
    again = hq.quantize(model(), "3.5bit", batches(), **kept)  # type: ignore[arg-type]
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in again.state_dict().items())


@contextmanager
def limited_to(place: Path, size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_is_for_one_process(tmp_path: Path) -> None:
    first, second = (Checkpoint(tmp_path / "ck", {"a": 1}) for _ in range(2))
    with first.held(), first.held():  # stages lie in one another
        with pytest.raises(ArtifactPathError, match="Another process is working in"), second.held():
            pass
        first.add_scores({"x": 1.0})
    with second.held():
        pass
    kept = {**OPTIONS, "checkpoint_dir": tmp_path / "busy"}
    hq.quantize(model(), "3.5bit", batches(), **kept)  # type: ignore[arg-type]
    with (
        storage.locked(tmp_path / "busy" / "checkpoint.json"),
        pytest.raises(ArtifactPathError, match="Another process is working in"),
    ):
        hq.quantize(model(), "3.5bit", batches(), **kept)  # type: ignore[arg-type]


def test_what_kills_left_in_a_checkpoint_is_removed(tmp_path: Path) -> None:
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / ".checkpoint.json.abc").write_text("{")
    (tmp_path / "ck" / ".1234.xyz").mkdir()
    with pytest.raises(ArtifactPathError, match="something else"):
        Checkpoint(tmp_path / "ck", {})
    (tmp_path / "ck" / ".1234.xyz").rmdir()
    kept = Checkpoint(tmp_path / "ck", {})
    for ours in (".0123456789abcdef.xyz", ".0123456789abcdef.old.xyz"):
        (tmp_path / "ck" / ours).mkdir()
    (tmp_path / "ck" / ".checkpoint.json.abc").write_text("{")
    (tmp_path / "ck" / ".git").mkdir()  # somebody else's
    with kept.held():
        assert sorted(path.name for path in (tmp_path / "ck").iterdir()) == [".git", "checkpoint.json"]


WRITE = """
import sys
from pathlib import Path
from tests.test_storage import save
for number in range(int(sys.argv[3])):
    save(Path(sys.argv[1]), int(sys.argv[2]) + number, int(sys.argv[4]))
"""


def writing(place: Path, first: int, count: int, size: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", WRITE, *map(str, (place, first, count, size))])


def test_two_writers_at_once(tmp_path: Path) -> None:
    place = tmp_path / "shared"
    save(place, 0)
    jobs = [writing(place, 1000 * number, 15, 50_000) for number in (1, 2)]
    seen = set()
    while any(job.poll() is None for job in jobs):
        try:
            seen.add(value_of(place))
        except ArtifactError:
            continue  # half of the old and half of the new was read, which the checksum tells
    assert [job.returncode for job in jobs] == [0, 0], "both could write, one after the other"
    assert value_of(place) in (1014, 2014)
    assert len(seen) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_the_second_of_two_who_do_not_overwrite_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, real = tmp_path / "shared", storage._digest

    def slow(path: Path) -> str:
        monkeypatch.setattr(storage, "_digest", real)
        save(place, 1)  # another one comes in between
        return real(path)

    monkeypatch.setattr(storage, "_digest", slow)
    with pytest.raises(ArtifactPathError, match="overwrite=True"):
        write_directory(place, KIND, 1, {"value": 2}, {"x": torch.full((4,), 2)})
    assert value_of(place) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_a_kill_while_overwriting_leaves_one_of_the_two(tmp_path: Path) -> None:
    place, rng = tmp_path / "saved", random.Random(0)
    save(place, 0)
    for _ in range(2):
        before = value_of(place)
        job = writing(place, before + 1, 10**6, 400_000)
        while job.poll() is None and read(place) in (None, before):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        job.kill()
        assert job.wait() == -signal.SIGKILL
        assert value_of(place) > before, "whole, and one of those that were written"


def read(place: Path) -> int | None:
    try:
        return value_of(place)
    except ArtifactError:
        return None


def test_without_an_exchange_of_names_it_moves_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "exchange", lambda *_: False)
    save(tmp_path / "saved", 1)
    save(tmp_path / "saved", 2)
    assert value_of(tmp_path / "saved") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_the_checksum_of_json() -> None:
    content = {"b": (1, 2.5, None), "a": {"x": float("inf")}, 3: "ü"}
    whole = sealed(content)
    assert sealed(whole) == whole
    assert sealed(dict(reversed(whole.items()))) == whole, "the order of keys does not matter"
    assert sealed({**content, "b": [1, 2.5, 0]})["checksum"] != whole["checksum"]


def test_everybody_may_read_what_is_saved(tmp_path: Path) -> None:
    save(tmp_path / "saved", 1)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "saved").iterdir()} == {"0o644"}
    assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o755


def test_bytes_are_written_whole(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"old")
    assert oct((tmp_path / "file").stat().st_mode & 0o777) == "0o644"
    with pytest.raises(OSError, match="too large"), full_disk():
        write_bytes(tmp_path / "file", bytes(4096))
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs root to mount read-only")
def test_a_read_only_disk(small: nn.Module, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o ro tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(ArtifactPathError, match="Read-only"):
            hq.save(small, disk / "model")
        with pytest.raises(ArtifactPathError, match="Read-only"):
            hq.quantize(model(), "4bit", batches(), checkpoint_dir=disk / "ck", **OPTIONS)  # type: ignore[arg-type]
    finally:
        os.system(f"umount {disk}")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for value in (1, 2):
        save(tmp_path / "link", value)
        assert (tmp_path / "link").is_symlink()
        assert value_of(tmp_path / "real") == value


def test_what_cannot_be_replaced_as_a_whole_is_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for check in (storage.check_place, lambda place: write_directory(place, "kind", 1, {}, {})):
        with pytest.raises(
            ArtifactPathError, match=r"is the current directory.*Choose a new directory in it: model"
        ):
            check(Path("."))
        with monkeypatch.context() as patched:
            patched.setattr(os.path, "ismount", lambda path: True)
            (tmp_path / "volume").mkdir(exist_ok=True)
            with pytest.raises(ArtifactPathError, match="is a mount point"):
                check(tmp_path / "volume")
    assert list(tmp_path.iterdir()) == [tmp_path / "volume"]
