import json
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import DATA, MODEL, call


def test_layers_and_what_stays_float(saved: Path) -> None:
    text = call("inspect", saved)
    assert text.exit_code == 0
    assert all(name in text.stdout for name in ("stem", "pointwise", "Conv2d", "BatchNorm"))
    data = json.loads(call("inspect", saved, "--json").stdout)
    assert [site["name"] for site in data["sites"]] == ["stem", "depthwise", "pointwise", "head"]


def test_kernels(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HQ_PLUGIN_CACHE", str(tmp_path))
    arguments = ("inspect", saved, "--kernels", "--model", MODEL, "--data", DATA)
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert "for one row" in result.stdout
    assert "int8" in result.stdout or "dequantized" in result.stdout
    assert (tmp_path / "kernels.json").exists()
    data = json.loads(call(*arguments, "--json").stdout)
    assert data["layers"].keys() == {"stem", "depthwise", "pointwise", "head"}
    assert all(layer["kernel"] in layer["milliseconds"] for layer in data["layers"].values())


def test_progress_stays_off_without_a_terminal(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    call("inspect", saved)
    assert capfd.readouterr().err == ""
    assert torch.is_grad_enabled()
