import json
from pathlib import Path

import numpy as np
import pytest

import hq_plugin as hq
from tests.cli.conftest import DATA, MODEL, call
from tests.conftest import TinyNet, digits_batches


def test_agrees_with_the_model(saved: Path) -> None:
    result = call("evaluate", saved, "--model", MODEL, "--data", DATA, "--json")
    assert result.exit_code == 0, result.output
    small = hq.load(saved, TinyNet())
    hits = sum(int((small(x).argmax(1) == y).sum()) for x, y in digits_batches())
    assert json.loads(result.stdout) == {"accuracy": pytest.approx(hits / 1797), "samples": 1797}


def test_the_float_model_beside_it(saved: Path, checkpoint: Path) -> None:
    arguments = ("evaluate", saved, "--model", MODEL, "--data", DATA, "--float", MODEL, "--checkpoint", checkpoint)
    told = json.loads(call(*arguments, "--json").stdout)
    assert told["float_accuracy"] > told["accuracy"] - 0.02
    assert told["float_accuracy"] > 0.9
    lines = call(*arguments).stdout.splitlines()
    assert lines == [
        f"accuracy {told['accuracy']:.4f} on 1797 samples",
        f"float accuracy {told['float_accuracy']:.4f} on 1797 samples",
    ]


def test_arrays(tmp_path: Path, saved: Path) -> None:
    x, y = digits_batches(256)[0]
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    result = call("evaluate", saved, "--model", MODEL, "--data", tmp_path / "data.npz")
    assert result.stdout.endswith(" on 256 samples\n")


def texts() -> list[str]:
    return ["one text", "another"]


def test_texts_are_for_models_of_hugging_face(saved: Path) -> None:
    result = call("evaluate", saved, "--model", MODEL, "--data", "tests.cli.test_evaluate:texts")
    assert result.exit_code == 2
    assert "A batch of type str" in result.stderr
