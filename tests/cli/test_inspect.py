import json
from dataclasses import replace
from pathlib import Path

import pytest

from hq_plugin.artifact import read_info
from hq_plugin.cli.output import print_result
from tests.cli.conftest import DATA, MODEL, call


def test_layers_and_what_stays_float(saved: Path) -> None:
    text = call("inspect", saved)
    assert text.exit_code == 0
    assert all(name in text.stdout for name in ("stem", "pointwise", "Conv2d", "BatchNorm"))
    data = json.loads(call("inspect", saved, "--json").stdout)
    assert [site["name"] for site in data["sites"]] == ["stem", "depthwise", "pointwise", "head"]
    assert data["result"]["used"]["weight_bits"] <= 1
    assert data["result"]["float_layers"]


def test_a_distance_is_shown_however_small_and_no_column_is_empty(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read_info(saved).result
    print_result(replace(found, kl=1.234e-6, accuracy=None, float_accuracy=None, baselines={}))  # type: ignore[type-var]
    text = capsys.readouterr().out
    assert "1.23e-06" in text
    assert "accuracy" not in text
    assert "of effective bits" in text


def test_a_model_that_must_be_given_is_asked_for_as_this_command_takes_it(saved: Path) -> None:
    result = call("inspect", saved, "--kernels")
    assert result.exit_code == 2
    assert "--model module:function" in result.stderr


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
