"""Figures of training and search for experiment trackers, by accelerate: TensorBoard, W&B, MLflow and others.

A stage calls `track`; where nobody asked for a tracker that does nothing. What people see on a terminal is
`progress.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from hq_plugin.config import Config
from hq_plugin.errors import ConfigError

#: Project of accelerate's trackers; TensorBoard's files are in a folder of this name.
PROJECT = "hq_plugin"


class _Run:
    """Trackers that are open, and the steps logged so far."""

    def __init__(self, config: Config) -> None:
        given = [tracker for tracker in config.trackers if isinstance(tracker, GeneralTracker)]
        named = [str(tracker) for tracker in config.trackers if not isinstance(tracker, GeneralTracker)]
        _check(named, config.tracker_dir)
        self._accelerator = Accelerator(log_with=named or None, project_dir=config.tracker_dir)
        self._accelerator.init_trackers(PROJECT, config=_scalars(config.to_json()))
        self._given, self._first, self._stage, self._next = given, 0, "", 0

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        if stage != self._stage:
            self._stage, self._first = stage, self._next
        total = self._first + step
        self._next = max(self._next, total + 1)
        named = {f"{stage}/{name}": value for name, value in values.items()}
        self._accelerator.log(named, step=total)
        for tracker in self._given:
            tracker.log(named, step=total)

    def finish(self) -> None:
        # Not `end_training`, which would end the processes' group as well. Trackers that came open stay open.
        for tracker in self._accelerator.trackers:
            tracker.finish()


_run: _Run | None = None


@contextmanager
def tracking(config: Config) -> Iterator[None]:
    """Inside, `track` logs to the trackers of a configuration; inside another, to that one's.

    Raises:
        ConfigError: accelerate has no such tracker, it is not installed, or it needs a directory.
    """
    global _run
    if _run is not None or not config.trackers:
        yield
        return
    _run = _Run(config)
    try:
        yield
    finally:
        open_run, _run = _run, None
        open_run.finish()


def track(stage: str, step: int, **values: float | None) -> None:
    """Logs figures as `stage/name`, where a tracker is open.

    Args:
        stage: Name of the stage.
        step: Number of the step in it. Trackers get steps that count on from one stage to the next, since some
            take no step twice.
        **values: Figures; None is left out.
    """
    if _run is not None:
        _run.log(stage, step, {name: value for name, value in values.items() if value is not None})


def _check(names: list[str], directory: str | None) -> None:
    installed = [str(tracker.value) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            possible = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ConfigError(f"There is no tracker {name!r}. accelerate knows {possible}.")
        # Classes that a user registered with accelerate are no members of LoggerType.
        if name in {member.value for member in LoggerType} and name not in installed:
            found = ", ".join(installed) or "none"
            raise ConfigError(f"The tracker {name!r} is not installed: pip install {name}. Installed: {found}.")
        if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory and directory is None:
            raise ConfigError(f'The tracker {name!r} writes files: say where, tracker_dir="runs".')


def _scalars(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration as trackers take it: what is no number, text or truth value as JSON."""
    plain = (bool, int, float, str)
    return {name: value if isinstance(value, plain) else json.dumps(value) for name, value in values.items()}
