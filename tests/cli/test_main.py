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


def test_profile_and_a_budget_of_latency(tmp_path: Path) -> None:
    widths = ["--weight-bits", "4,8", "--activation-bits", "8"]
    result = call("profile", MODEL, "--data", DATA, "--out", tmp_path / "p.json", *widths)
    assert result.exit_code == 0, result.output
    assert len(hq.Profile.load(tmp_path / "p.json").layers) == 4
    arguments = ["--data", DATA, "--effort", "smoke", "--profile", tmp_path / "p.json", "--out", tmp_path / "small"]
    result = call("quantize", MODEL, "1000s", *arguments, "--target", "torch", *widths)
    assert result.exit_code == 0, result.output


def test_export_and_kernels_of_a_saved_model(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = call("export", saved, "--out", tmp_path / "m.onnx", "--model", MODEL, "--data", DATA)
    assert result.exit_code == 0, result.output
    assert all(f"{name}: " in result.stdout for name in ("stem", "depthwise", "pointwise", "head"))
    assert (tmp_path / "m.onnx").stat().st_size > 1000
    monkeypatch.setenv("HQ_PLUGIN_CACHE", str(tmp_path))
    result = call("inspect", saved, "--kernels", "--model", MODEL, "--data", DATA)
    assert result.exit_code == 0, result.output
    assert "int8" in result.stdout or "dequantized" in result.stdout
    assert (tmp_path / "kernels.json").exists()
    result = call("export", saved, "--out", tmp_path / "m.onnx", "--model", MODEL)
    assert result.exit_code == 2
    assert "--data" in result.stderr


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
        (("quantize", "tests.conftest:SITES", "3bit", "--data", DATA), "not a function"),
        (("quantize", MODEL, "3bit", "--data", DATA, "--pretrained"), "for timm models"),
        (("quantize", "timm:resnet10t", "3bit", "--model-arg", "in_chans"), "name=value"),
        (("quantize", "timm:resnet10t", "3bit", "--model-arg", "no_such=1"), "no_such"),
        (("quantize", MODEL, "3bit", "--data", "tests"), "not a timm model"),
        (("quantize", MODEL, "3bit", "--data", DATA, "--checkpoint", "missing.safetensors"), "missing.safetensors"),
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


def test_a_directory_that_is_taken_is_found_out_before_the_work(saved: Path, tmp_path: Path) -> None:
    def refused(out: Path, *more: str) -> str:
        # The data does not exist: had the work begun, that would be the error.
        result = call("quantize", MODEL, "3bit", "--data", "missing.npz", "--out", out, *more)
        assert result.exit_code == 2
        return result.stderr

    assert "--overwrite" in refused(saved)
    assert "is not there" in refused(saved, "--overwrite")
    (tmp_path / "notes.txt").write_text("mine")
    assert "something else" in refused(tmp_path, "--overwrite")


def test_a_timm_model_of_built_in_data(tmp_path: Path) -> None:
    arguments = ["--model-arg", "in_chans=1", "--model-arg", "num_classes=10", "--effort", "smoke", "--json"]
    out = tmp_path / "small"
    result = call("quantize", "timm:test_resnet", "4bit", "--data", "digits", "--out", out, *arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["costs"]["weight_bits"] <= 4
    evaluated = call("evaluate", out, "--data", "digits", "--json")
    assert json.loads(evaluated.stdout)["samples"] == 360, "the part that was not trained on"


def test_a_folder_of_images(tmp_path: Path) -> None:
    from PIL import Image

    for n in range(12):
        Image.effect_noise((40, 40), 60).convert("RGB").save(tmp_path / f"{n}.png")
    out = tmp_path / "small"
    result = call("quantize", "test_resnet", "4bit", "--data", tmp_path, "--out", out, "--effort", "smoke")
    assert result.exit_code == 0, result.output
    assert "budget 4bit" in result.stdout


def test_warnings_are_one_line_on_stderr(tmp_path: Path) -> None:
    result = call("quantize", MODEL, "4bit", "--out", tmp_path / "small", "--effort", "smoke", "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("warning: No data was given")
    assert json.loads(result.stdout)["costs"]["weight_bits"] <= 4


def test_bad_arrays(tmp_path: Path, saved: Path) -> None:
    def refused(**arrays: np.ndarray) -> str:
        np.savez(tmp_path / "data.npz", **arrays)
        result = call("evaluate", saved, "--model", MODEL, "--data", tmp_path / "data.npz")
        assert result.exit_code == 2
        return result.stderr

    assert "no array x" in refused(y=np.zeros(3))
    assert "2 labels" in refused(x=np.zeros((3, 1, 8, 8)), y=np.zeros(2))
    assert "of numbers" in refused(x=np.array([{}], dtype=object)), "nothing is unpickled"
    (tmp_path / "data.npz").write_bytes(b"nothing")
    assert call("evaluate", saved, "--model", MODEL, "--data", tmp_path / "data.npz").exit_code == 2


def broken() -> nn.Module:
    raise KeyError("mine")


def test_an_error_in_the_code_of_a_user_has_another_exit_code(tmp_path: Path) -> None:
    arguments = ("quantize", "tests.cli.test_main:broken", "3bit", "--out", tmp_path / "out")
    result = call(*arguments)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == ["error: KeyError: 'mine' (--debug shows the traceback)"]
    assert isinstance(call(*arguments, "--debug").exception, KeyError)


def test_wrong_usage_is_exit_code_2_and_plain_text() -> None:
    result = call("quantize", MODEL)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Missing argument" in result.stderr
