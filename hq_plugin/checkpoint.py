"""Resuming: long work that was killed goes on where it was, to the same result.

A checkpoint is a directory. Training writes its state there every so often, whole or not at all; every score is
one line of a log. Resuming runs the same program again: what is in the checkpoint is read and not computed. A
checkpoint is for one float model, one set of options and one budget, and refuses any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hq_plugin.distribution import in_first, in_pieces, is_first
from hq_plugin.errors import ArtifactError, ArtifactPathError, HQWarning
from hq_plugin.exclusive import locked
from hq_plugin.sharding import in_pieces_like, whole
from hq_plugin.storage import read_json, read_sealed, read_tensors, sealed, write_directory, write_text
from hq_plugin.untrusted import clean_errors, read_file

FORMAT, VERSION = "hq_plugin checkpoint", 1
_KEY, _SCORES = "checkpoint.json", "scores.jsonl"
#: Seconds between two states of a training stage.
INTERVAL = 60.0
#: Names of what kills in the middle of writing leave: of the key's file, and of a stage's directory.
_LEFT = re.compile(rf"\.({re.escape(_KEY)}|[0-9a-f]{{16}})\.")


class Checkpoint:
    """A directory in which one call of `quantize` or `meta_train` keeps what it has done.

    Args:
        directory: A new or empty directory, or one of an earlier start of the same call.
        key: What the work depends on, JSON values; another key is refused.
        interval: Seconds between two states of a training stage.
        data: By what the data is known. Other data is warned of and not refused: it may be drawn at random.

    Raises:
        ArtifactError: The directory holds the checkpoint of other work.
        ArtifactPathError: The directory holds something else, cannot be written, or is not seen by all processes.
    """

    def __init__(
        self, directory: str | Path, key: Mapping[str, Any], interval: float = INTERVAL, data: str | None = None
    ) -> None:
        self.directory, self.interval = Path(directory).expanduser(), interval
        self._holders, self._warned = 0, False
        wanted = json.loads(json.dumps(dict(key)))
        in_first(lambda: self._claim(wanted, data))
        # A process that sees nothing of what was kept would begin anew where the others go on.
        if not (self.directory / _KEY).exists():
            raise ArtifactPathError(
                f"The first process keeps what it does in {self.directory}, which this one does not see. Give a "
                "checkpoint_dir that all hosts share."
            )
        self._scores = self._read_scores()
        self._last = time.monotonic()

    def _claim(self, wanted: dict[str, Any], data: str | None) -> None:
        file = self.directory / _KEY
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                names = sorted(path.name for path in self.directory.iterdir())
                # What a kill left of the very first file is ours.
                others = [name for name in names if not name.startswith(f".{_KEY}.")]
                if others:
                    raise ArtifactPathError(
                        f"{self.directory} holds something else ({', '.join(others[:4])}). Choose an empty or a "
                        "new directory for the checkpoint."
                    )
                content = sealed({"format": FORMAT, "version": VERSION, "key": wanted, "data": data})
                write_text(file, json.dumps(content, indent=1))
        except ArtifactPathError:
            raise
        except OSError as error:
            raise ArtifactPathError(f"{self.directory} cannot be used for a checkpoint: {error}") from error
        found = read_sealed(file, FORMAT, VERSION)
        kept = found.get("key")
        if not isinstance(kept, dict):
            kept = {}
        both = {**wanted, **kept}
        different = [name for name in both if json.dumps(kept.get(name)) != json.dumps(wanted.get(name))]
        if different:
            raise ArtifactError(
                f"{self.directory} is the checkpoint of other work: {', '.join(different[:5])} differ. Choose "
                "another directory, or delete it to start anew."
            )
        if found.get("data", data) != data:
            warnings.warn(
                f"{self.directory} was begun with other data than now, or with data that is drawn at random: what "
                "is kept there is of that. If the data changed, choose another directory, or delete it.",
                HQWarning,
                stacklevel=2,
            )

    def _read_scores(self) -> dict[str, float]:
        scores: dict[str, float] = {}
        file = self.directory / _SCORES
        if file.exists():
            try:
                lines = read_file(file).decode(errors="replace").splitlines()
            except OSError as error:
                raise ArtifactError(f"{file} cannot be read: {error}") from error
            for line in lines:
                # A line that a kill cut short, or that is damaged, is scored again.
                with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError, OverflowError):
                    record = json.loads(line)
                    if record == sealed(record):
                        scores[str(record["of"])] = float.fromhex(record["score"])
        return scores

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no other process works with this checkpoint.

        Raises:
            ArtifactPathError: Another one does already.
        """
        if not is_first() or self._holders:
            yield
            return
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.directory / _KEY, wait=False))
            except BlockingIOError as error:
                raise ArtifactPathError(
                    f"Another process is working in {self.directory}. Wait for it, or choose another "
                    "checkpoint_dir."
                ) from error
            self._holders += 1
            try:
                self._tidy()
                yield
            finally:
                self._holders -= 1

    def _tidy(self) -> None:
        """Removes what kills in the middle of writing left behind."""
        for path in self.directory.glob(".*"):
            if not _LEFT.match(path.name):  # somebody else's
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def score(self, of: str) -> float | None:
        """Returns a score that is known, or None."""
        return self._scores.get(of)

    def add_scores(self, scores: Mapping[str, float]) -> None:
        """Keeps scores, exactly."""
        self._scores.update(scores)
        if not is_first() or not scores:
            return
        lines = [json.dumps(sealed({"of": of, "score": float(value).hex()})) for of, value in scores.items()]
        file = self.directory / _SCORES
        try:
            with open(file, "a+b") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(size - 1, 0))
                torn = size > 0 and log.read() != b"\n"
                log.write((("\n" if torn else "") + "\n".join(lines) + "\n").encode())
                log.flush()
                os.fsync(log.fileno())
        except OSError as error:
            self._could_not_keep(error)

    def due(self) -> bool:
        """Whether the next state should be kept."""
        return time.monotonic() - self._last >= self.interval

    def keep(
        self, stage: str, step: int, network: nn.Module, optimizer: Any, history: list[dict[str, Any]]
    ) -> None:
        """Keeps the state of a training stage after `step` steps."""
        tensors = {f"network.{name}": tensor for name, tensor in _own_tensors(network).items()}
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
        content = {"stage": stage, "step": step, "history": history}
        copies = {}
        for name in sorted(tensors):  # a state that was restored has them in any order
            complete = whole(tensors[name].detach())  # which takes every process; one writes
            if is_first():
                copies[name] = complete.to("cpu", copy=True)
        try:
            write_directory(self._place(stage), FORMAT, VERSION, content, copies, overwrite=True)
        except ArtifactPathError as error:
            self._could_not_keep(error)
        self._last = time.monotonic()

    def _could_not_keep(self, error: OSError) -> None:
        """Says once that nothing is kept for now: a full disk must not cost the work that is in memory."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"What was done could not be kept in {self.directory}: {error} Work goes on; what was kept before "
                "stays, and later states are tried.",
                HQWarning,
                stacklevel=3,
            )

    def restore(self, stage: str, network: nn.Module, optimizer: Any) -> tuple[int, list[dict[str, Any]]]:
        """Puts the state that was kept back.

        Returns:
            Steps done and their history; none where nothing was kept.

        Raises:
            ArtifactError: The state is damaged.
        """
        place = self._place(stage)
        if not place.exists():
            return 0, []
        content = read_json(place, FORMAT, VERSION)
        tensors = read_tensors(place, content.get("sha256"))
        with clean_errors(f"{place} (delete {self.directory} to start anew)"):
            own = _own_tensors(network)
            kept = {name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")}
            if {name: t.shape for name, t in kept.items()} != {name: t.shape for name, t in own.items()}:
                raise ValueError("it is of another network")
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(in_pieces_like(kept[name], tensor))
            state = optimizer.state_dict()
            state["state"] = {}
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for name, tensor in tensors.items():
                if name.startswith("optimizer."):
                    _, index, field = name.split(".", 2)
                    like = parameters[int(index)]
                    moment = tensor if tensor.dim() == 0 else in_pieces_like(tensor, like)
                    if moment.dim() and not in_pieces(moment):
                        # In the weight's memory format: a fused optimizer goes through both as they lie in memory.
                        moment = torch.empty_like(like, dtype=moment.dtype, device=moment.device).copy_(moment)
                    state["state"].setdefault(int(index), {})[field] = moment
            optimizer.load_state_dict(state)
            return int(content["step"]), list(content["history"])

    def _place(self, stage: str) -> Path:
        return self.directory / hashlib.sha256(stage.encode()).hexdigest()[:16]


def _own_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of a network, shared ones once."""
    first: dict[int, str] = {}
    return {
        name: tensor
        for name, tensor in network.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and first.setdefault(id(tensor), name) == name
    }
