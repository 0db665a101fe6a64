"""Trackers, with TensorBoard's own reader on what was written, and one of a user's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import hq_plugin as hq
from hq_plugin.tracking import PROJECT, track, tracking

SMOKE: dict[str, Any] = {"effort": "smoke", "progress": False}


class Memory(GeneralTracker):
    name = "memory"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    @property
    def tracker(self) -> list[tuple[int, dict[str, float]]]:
        return self.rows

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


def read(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory / PROJECT))
    events.Reload()
    return events


def test_one_run_holds_all_stages(trained: nn.Module, batches, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    options = {**SMOKE, "trackers": "tensorboard", "tracker_dir": tmp_path}
    small: Any = hq.quantize(trained, "4bit", batches, **options)
    events, result = read(tmp_path), small.hq
    for stage, name in (("meta-training", "meta_training"), ("fine-tuning", "finetune")):
        logged = [event.value for event in events.Scalars(f"{stage}/loss")]
        assert logged == pytest.approx([record["loss"] for record in result.history[name]], rel=1e-6)
    best = [event.value for event in events.Scalars("search/best")]
    assert best == sorted(best, reverse=True)
    assert best[-1] == pytest.approx(min(record["score"] for record in result.history["search"]), rel=1e-6)
    assert events.Scalars("result/bits")[0].value == pytest.approx(result.effective_bits, rel=1e-6)
    stages = ("meta-training/loss", "search/best", "fine-tuning/loss", "result/kl")
    steps = [event.step for stage in stages for event in events.Scalars(stage)]
    assert steps == sorted(set(steps)), "some trackers take no step twice"
    assert result.config["trackers"] == ["tensorboard"]

    plain: Any = hq.quantize(trained, "4bit", batches, **SMOKE)
    assert torch.equal(plain(batches[0][0]), small(batches[0][0])), "logging changes nothing"


def test_a_session_logs_each_of_its_stages(trained: nn.Module, batches, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    memory = Memory()
    session = hq.meta_train(trained, batches, **SMOKE, trackers=[memory])
    assert [step for step, _ in memory.rows] == list(range(6))
    session.quantize("4bit")
    names = {name for _, values in memory.rows for name in values}
    assert {"search/best", "search/generation", "fine-tuning/loss", "result/kl"} <= names
    assert not memory.finished, "whoever opened a tracker closes it"
    session.save(tmp_path / "session")
    again = hq.load_session(tmp_path / "session", trained, batches)
    assert again.config.trackers == (), "a session that is loaded logs where its user says"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"trackers": "tensorbord"}, "accelerate knows .*tensorboard"),
        ({"trackers": ("tensorboard",)}, "tracker_dir"),
        ({"trackers": ("aim",), "tracker_dir": "runs"}, "pip install aim"),
    ],
)
def test_bad_trackers_are_found_out_at_once(options: dict[str, Any], says: str) -> None:
    with pytest.raises(hq.ConfigError, match=says), tracking(hq.Config(**options)):
        pass


def test_outside_a_run_nothing_is_logged() -> None:
    PartialState()
    memory = Memory()
    track("stage", 0, loss=1.0)
    with tracking(hq.Config(trackers=(memory,))):
        track("stage", 0, loss=1.0, accuracy=None)
        with tracking(hq.Config(trackers=(Memory(),))):
            track("other", 0, loss=2.0)
    track("stage", 1, loss=1.0)
    assert memory.rows == [(0, {"stage/loss": 1.0}), (1, {"other/loss": 2.0})]
