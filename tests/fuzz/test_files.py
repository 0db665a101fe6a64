"""Files of strangers: a clean error in bounded time and memory, and never another model in silence.

`corpus.jsonl` keeps cases that once were found to break something, one `{"target", "reseal", "changes"}` a line.
"""

from __future__ import annotations

import json
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from hq_plugin.storage import JSON_FILE
from tests.fuzz.mutations import Case, cases, mutated, write
from tests.fuzz.targets import TARGETS, Target

CORPUS = [json.loads(line) for line in (Path(__file__).parent / "corpus.jsonl").read_text().splitlines()]
#: A file of a few kilobytes is refused or read within so many seconds, on a busy machine, and so many bytes.
SECONDS, BYTES = 60, 768 << 20
#: Cases in the suite, and with `-m slow`.
QUICK = {"artifact": 150, "rebuilt": 15, "session": 25, "checkpoint": 80, "profile": 80, "policy": 80, "folder": 15}
SLOW = {
    "artifact": 10_000,
    "rebuilt": 500,
    "session": 1_000,
    "checkpoint": 2_000,
    "profile": 2_000,
    "policy": 2_000,
    "folder": 500,
}


class Slow(Exception):
    """Reading took longer than it may."""


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, time and memory are limited."""

    def stop(*_: object) -> None:
        raise Slow

    def memory(field: str) -> int:
        return next(
            int(line.split()[1]) << 10
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(field)
        )

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert memory("VmHWM") - before < BYTES


def check(target: Target, case: Case, place: Path, expected: object) -> None:
    files, links = mutated(target.files, case["changes"])
    write(place, files, links)
    if case["reseal"]:
        target.reseal(place)
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            outcome = target.read(place)
        except Slow:
            raise
        except target.clean:
            return
    if not case["reseal"]:
        assert outcome == expected, "another model, in silence"


def fuzz(name: str, count: int, tmp_path: Path) -> None:
    target = TARGETS[name](tmp_path / "good")
    write(tmp_path / "copy", target.files, {})
    expected = target.read(tmp_path / "copy")

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(case=cases)
    def run(case: Case) -> None:
        check(target, case, tmp_path / "case", expected)

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files(name: str, tmp_path: Path) -> None:
    fuzz(name, QUICK[name], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TARGETS)
def test_many_mutated_files(name: str, tmp_path: Path) -> None:
    fuzz(name, SLOW[name], tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_cases_that_were_found(name: str, tmp_path: Path) -> None:
    target = TARGETS[name](tmp_path / "good")
    write(tmp_path / "copy", target.files, {})
    expected = target.read(tmp_path / "copy")
    for case in CORPUS:
        if case["target"] == name:
            check(target, case, tmp_path / "case", expected)


def test_a_damaged_file_is_noticed_wherever_the_damage_is(tmp_path: Path) -> None:
    """Every bit counts: none of the JSON can be flipped to another model."""
    target = TARGETS["artifact"](tmp_path / "good")
    expected = target.read(tmp_path / "good")
    for position in range(0, 10**6, 40_000):
        case = {"reseal": False, "changes": [["flip", list(target.files).index(JSON_FILE), position, position % 7]]}
        check(target, case, tmp_path / "case", expected)
