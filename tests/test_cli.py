import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import hq_plugin as hq
from hq_plugin.cli import app
from tests.conftest import TinyNet, digits_batches

MODEL, DATA = "tests.conftest:TinyNet", "tests.conftest:digits_batches"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def saved(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_file(trained.state_dict(), folder / "float.safetensors")
    arguments = ["--data", DATA, "--checkpoint", folder / "float.safetensors", "--effort", "smoke"]
    result = call("quantize", MODEL, "3bit", *arguments, "--out", folder / "small", "--activation-bits", "4,8")
    assert result.exit_code == 0, result.output
    assert "fine-tuned" in result.stdout
    return folder / "small"


def test_quantize_writes_what_load_reads(saved: Path) -> None:
    small = hq.load(saved, TinyNet())
    assert small.hq.effective_bits <= 3
    assert {bits.activation for bits in small.hq.policy.values()} <= {4, 8}


def test_inspect(saved: Path) -> None:
    text = call("inspect", saved)
    assert text.exit_code == 0
    assert all(name in text.stdout for name in ("stem", "pointwise", "Conv2d", "BatchNorm"))
    data = json.loads(call("inspect", saved, "--json").stdout)
    assert [site["name"] for site in data["sites"]] == ["stem", "depthwise", "pointwise", "head"]


def test_evaluate_agrees_with_the_model(saved: Path) -> None:
    result = call("evaluate", saved, "--model", MODEL, "--data", DATA, "--json")
    assert result.exit_code == 0, result.output
    small = hq.load(saved, TinyNet())
    batches = digits_batches()
    hits = sum(int((small(x).argmax(1) == y).sum()) for x, y in batches)
    assert json.loads(result.stdout) == {"accuracy": pytest.approx(hits / 1797), "samples": 1797}


def test_arrays(tmp_path: Path, saved: Path) -> None:
    x, y = digits_batches(256)[0]
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    result = call("evaluate", saved, "--model", MODEL, "--data", tmp_path / "data.npz", "--json")
    assert json.loads(result.stdout)["samples"] == 256


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("quantize", MODEL, "much", "--data", DATA), "cannot be read"),
        (("quantize", MODEL, "1bit", "--data", DATA), "cannot be met"),
        (("quantize", "no_such_net", "3bit", "--data", DATA), "no model"),
        (("quantize", "nowhere:f", "3bit", "--data", DATA), "module:function"),
        (("quantize", MODEL, "3bit", "--data", "missing.npz"), "is not there"),
        (("quantize", MODEL, "3bit", "--data", DATA, "--weight-bits", "two"), "no list of widths"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    result = call(*arguments, "--out", tmp_path / "out", "--effort", "smoke")
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_debug_raises(tmp_path: Path) -> None:
    result = call("inspect", tmp_path, "--debug")
    assert isinstance(result.exception, hq.ArtifactError)
    assert call("inspect", tmp_path).exit_code == 2


def test_help() -> None:
    assert {"quantize", "inspect", "evaluate", "demo"} <= set(call("--help").stdout.split())


def test_progress_stays_off_without_a_terminal(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    call("inspect", saved)
    assert capfd.readouterr().err == ""
    assert torch.is_grad_enabled()
