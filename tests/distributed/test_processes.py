"""Real processes over gloo, against one process."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hq_plugin as hq
from tests.distributed import launching
from tests.distributed.conftest import assert_same
from tests.distributed.job import Plain
from tests.distributed.launching import reports, run, torchrun


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_reach_what_one_reaches(count: int, alone: dict[str, Any], tmp_path: Path) -> None:
    # 30 samples over 4 processes are not split evenly, and still the same mean.
    done = run(torchrun(count, tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(reports(tmp_path, count), alone)
    # One process wrote the files, whole.
    loaded = hq.load(tmp_path / "model", Plain())
    assert loaded.hq.policy.to_json() == alone["policy"]  # type: ignore[union-attr]


def test_accumulated_gradients_are_those_of_one_process(alone: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for out, command in ((tmp_path / "one", launching.alone), (tmp_path / "two", partial(torchrun, 2))):
        out.mkdir()
        done = run(command(out), ACCELERATE_GRADIENT_ACCUMULATION_STEPS="2")
        assert done.returncode == 0, done.stderr[-3000:]
        found += reports(out, 1)
    one, two = found
    # The first steps: later Adam makes a step of full length of a gradient that is 0 but for the order of its sum.
    np.testing.assert_allclose(two["meta"][:3], one["meta"][:3], rtol=0, atol=1e-5)
    assert two["searched"][0] == one["searched"][0]
    assert abs(one["meta"][1] - alone["meta"][1]) > 1e-4, "two batches a step are not one"


@pytest.mark.parametrize("dies", [pytest.param(5, marks=pytest.mark.slow), 20], ids=["sensitivities", "training"])
def test_a_process_that_dies_ends_the_job_and_a_restart_goes_on(
    dies: int, alone: dict[str, Any], tmp_path: Path
) -> None:
    # torchrun ends the other process once it looks; a slow machine's needs time to speak before that.
    done = run(torchrun(2, tmp_path, dies, monitor_interval=10))
    assert done.returncode != 0
    # torchrun names it, and what the other one says is of use.
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : -9" in done.stderr
    assert "TrainingError: Another of the 2 processes has ended" in done.stderr
    assert not (tmp_path / "model").exists()
    again = run(torchrun(2, tmp_path))
    assert again.returncode == 0, again.stderr[-3000:]
    assert_same(reports(tmp_path, 2), alone)


def test_processes_plan_by_the_same_losses(tmp_path: Path) -> None:
    done = run(torchrun(2, tmp_path, module="tests.distributed.planning"))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = reports(tmp_path, 2)
    assert first == second
    assert (first["first"], first["refused"]) == (0, "process 0 cannot")


def test_processes_that_normalise_by_their_shares_end_with_one_network(tmp_path: Path) -> None:
    done = run(torchrun(2, tmp_path, module="tests.distributed.normalised"))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = reports(tmp_path, 2)
    assert [record["batch_statistics"] for record in first["near"]["history"]] == [False] * 20
    assert [record["batch_statistics"] for record in first["far"]["history"]] == [False] * 2 + [True] * 18
    assert first == second


def test_parameters_in_pieces_reach_what_one_process_reaches(alone: dict[str, Any], tmp_path: Path) -> None:
    done = run(torchrun(2, tmp_path, module="tests.distributed.sharded"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(reports(tmp_path, 2), alone)
    loaded = hq.load(tmp_path / "model", Plain())
    assert loaded.hq.policy.to_json() == alone["policy"]  # type: ignore[union-attr]


@pytest.mark.slow
def test_parameters_in_pieces_survive_a_kill(alone: dict[str, Any], tmp_path: Path) -> None:
    done = run(torchrun(2, tmp_path, 20, module="tests.distributed.sharded", monitor_interval=10))
    assert done.returncode != 0
    assert "TrainingError: Another of the 2 processes has ended" in done.stderr
    again = run(torchrun(2, tmp_path, module="tests.distributed.sharded"))
    assert again.returncode == 0, again.stderr[-3000:]
    assert_same(reports(tmp_path, 2), alone)


def test_what_is_in_pieces(tmp_path: Path) -> None:
    done = run(torchrun(2, tmp_path, module="tests.distributed.pieces"))
    assert done.returncode == 0, done.stderr[-3000:]
    for report in reports(tmp_path, 2):
        assert report.pop("held") == pytest.approx(0.5, abs=0.01)
        assert report.pop("results") == [10, 20, 30]
        assert report.pop("calls") == 2
        assert "Scalar cannot be sharded" in report.pop("refused")
        assert all(value is True for value in report.values()), report


def test_a_job_may_end_right_after_its_last_collectives(tmp_path: Path) -> None:
    for _ in range(3):  # it is a race: one run in three or so went well before
        done = run(torchrun(2, module="tests.distributed.ending"))
        assert done.returncode == 0, done.stderr[-3000:]
