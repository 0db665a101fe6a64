"""The benchmark of rivals: bytes are counted alike for all, failures say why, and nothing is measured twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.benchmarks.rivals import __main__ as rivals
from tests.benchmarks.rivals import environment, page, tasks
from tests.benchmarks.rivals.accounting import count, layer_bytes

LAYERS = {
    "a": {"bits": 3, "elements": 100, "scales": 4},  # 38 bytes packed (37.5), 8 of scales
    "b": {"bits": 4, "elements": 64, "scales": 2, "zeros": 2, "zero_bits": 4},  # 32, 4, and a byte of zero points
    "c": {"bits": 32, "elements": 10},  # left alone: 40
}


def test_bytes_are_those_counted_by_hand() -> None:
    assert [layer_bytes(layer) for layer in LAYERS.values()] == [46, 37, 40]
    counted = count({"layers": LAYERS, "activation_tensors": 2, "float_elements": 5})
    assert counted["bytes"] == 46 + 37 + 40 + 2 * 8 + 5 * 4
    assert counted["effective_bits"] == pytest.approx(8 * (46 + 37 + 40) / 174)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes two images and a float model that is sure of class 0 stand for the real ones."""
    labels = torch.tensor([0, 1])
    images = torch.zeros(2, 1, 28, 28)
    monkeypatch.setattr(tasks, "CACHE", tmp_path)
    monkeypatch.setattr(tasks, "files", lambda model: {})
    monkeypatch.setattr(tasks, "images", lambda: (images, labels, images, labels))
    monkeypatch.setattr(tasks, "float_logits", lambda model: torch.tensor([[2.0, 0.0], [2.0, 0.0]]))
    monkeypatch.setattr(rivals, "ROWS", tmp_path / "rivals.jsonl")
    return tmp_path


def answer(rival: str, folder: Path, timeout: float, threads: int) -> None:
    """Answers as a rival's script does."""
    save_file({"logits": torch.tensor([[2.0, 0.0], [0.0, 2.0]])}, folder / "logits.safetensors")
    said = {
        "layers": LAYERS,
        "activation_tensors": 2,
        "float_elements": 5,
        "activation_bits": 8,
        "measured": None,
        "seconds": {"search": 1.0},
        "peak_gb": 0.5,
        "versions": {"torch": "2"},
    }
    (folder / "result.json").write_text(json.dumps(said))


def test_a_row_is_measured_here_and_never_twice(cache: Path) -> None:
    measured = list(rivals.rows("mct", "resnet20", [3.0], 0, set(), run=answer))
    assert [row["method"] for row in measured] == ["mct mixed precision", "mct mixed precision, GPTQ"]
    row = measured[0]
    assert (row["budget"], row["accuracy"], row["agreement"], row["float_accuracy"]) == ("3bit", 1.0, 0.5, 0.5)
    # One of two images has its scores exchanged: KL is 2 (p - (1 - p)) there, and 0 for the other.
    p = torch.sigmoid(torch.tensor(2.0))
    assert row["kl"] == pytest.approx(float(2 * (2 * p - 1)) / 2, rel=1e-5)
    assert row["policy"] == {"a": 3, "b": 4, "c": 32}

    rivals.ROWS.write_text("".join(json.dumps(row) + "\n" for row in measured) + '{"cut sh')
    done = {rivals.key(row) for row in rivals.finished()}
    assert list(rivals.rows("mct", "resnet20", [3.0], 0, done, run=answer)) == []
    text = "\n".join(page.lines(rivals.finished()))
    assert "| 3bit | mct mixed precision | 0.7616 |" in text


def test_a_failure_is_a_row_with_its_reason(cache: Path) -> None:
    def fail(rival: str, folder: Path, timeout: float, threads: int) -> None:
        raise RuntimeError(environment.reason("Traceback\n  File x\nValueError: no 3 bits here\n"))

    (row,) = rivals.rows("hqq", "smollm2", [3.0], 0, set(), run=fail)
    assert row["error"] == "ValueError: no 3 bits here"
    assert "ValueError: no 3 bits here" in "\n".join(page.lines([row]))


def test_a_script_that_fails_says_why(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real runner, with this interpreter in the place of the rival's."""
    import sys

    monkeypatch.setattr(environment, "python_of", lambda rival: Path(sys.executable))
    with pytest.raises(RuntimeError, match="ModuleNotFoundError: No module named 'hqq'"):
        environment.run("hqq", cache, 60, 1)
