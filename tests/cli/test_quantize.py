import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hq_plugin as hq
from hq_plugin.artifact import read_info
from hq_plugin.cli.quantize import warn_if_larger
from tests.cli.conftest import DATA, MODEL, call
from tests.conftest import SITES, TinyNet


def test_writes_what_load_reads(saved: Path) -> None:
    small = hq.load(saved, TinyNet())
    assert small.hq.effective_bits <= 3
    assert {bits.activation for bits in small.hq.policy.values()} <= {4, 8}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("much", "--data", DATA), "cannot be read"),
        (("1bit", "--data", DATA), "cannot be met"),
        (("--data", DATA), "Give a budget"),
        (("3bit", "--data", DATA, "--policy", "p.json"), "not both"),
        (("--data", DATA, "--policy", "missing.json"), "no policy file missing.json"),
        (("3bit", "--data", DATA, "--weight-bits", "two"), "no list of widths"),
        (("3bit", "--data", DATA, "-o", "no_such=1"), "no option 'no_such'"),
        (("3bit", "--data", DATA, "--checkpoint", "missing.safetensors"), "missing.safetensors"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    result = call("quantize", MODEL, *arguments, "--out", tmp_path / "out", "--effort", "smoke")
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_size_of_the_file_is_said(tmp_path: Path) -> None:
    options = ["--data", DATA, "--effort", "smoke", "-o", "meta_steps=0", "-o", "finetune_steps=0"]
    result = call("quantize", MODEL, "3bit", *options, "--out", tmp_path / "small")
    written = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert f"saved to {tmp_path / 'small'}: {written:,} bytes" in result.stdout


def test_a_file_that_its_header_makes_larger_than_the_budget_is_noticed(
    saved: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    save_file({"weight": torch.zeros(51_000, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    found = read_info(saved).result
    assert found is not None
    found = replace(found, costs=replace(found.costs, size=51_000))
    for used in ({"size_fraction": 1.0}, {"size": 51 / 52}):
        warn_if_larger(tmp_path, replace(found, used=used))
    assert not recwarn.list, "nobody named bytes, or the file keeps the budget"
    with pytest.warns(hq.HQWarning, match="give 50KB"):
        warn_if_larger(tmp_path, replace(found, used={"size": 51_000 / 51_010}))


def test_any_field_of_the_configuration_is_an_option(tmp_path: Path) -> None:
    options = ["-o", 'pinned={"stem": [8, 8]}', "-o", "meta_steps=0", "-o", "finetune_steps=0", "--effort", "smoke"]
    result = call("quantize", MODEL, "4bit", "--data", DATA, "--out", tmp_path / "small", *options, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["policy"]["stem"] == [8, 8]
    assert data["config"]["meta_steps"] == 0


def test_a_policy_file_without_a_session(tmp_path: Path) -> None:
    widths = {name: [4 if number % 2 else 3, 6] for number, name in enumerate(SITES)}
    (tmp_path / "policy.json").write_text(json.dumps(widths))
    arguments = ["--policy", tmp_path / "policy.json", "--data", DATA, "--effort", "smoke", "-o", "meta_steps=1"]
    result = call("quantize", MODEL, *arguments, "--out", tmp_path / "small")
    assert result.exit_code == 0, result.output
    assert "no budget: given policy" in result.stdout
    made = hq.load(tmp_path / "small", TinyNet()).hq
    assert made.policy.to_json() == widths
    assert made.config["weight_bits"] == [3, 4]
    assert made.config["activation_bits"] == [6]


def test_a_policy_that_is_not_possible_is_found_out_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hq_plugin.session.build_network", lambda *_: pytest.fail("the work began"))
    widths = {name: [4, 8] for name in SITES}
    for wrong, says in (
        ({"neck": [4, 8]}, "it names neck"),
        ({"stem": [4, 8, 3]}, "group size of 3; this search space has 0"),
        ({"stem": [4, 8, 0, 1]}, "dynamic"),
    ):
        (tmp_path / "policy.json").write_text(json.dumps(widths | wrong))
        arguments = ["--policy", tmp_path / "policy.json", "--data", DATA, "--out", tmp_path / "small"]
        result = call("quantize", MODEL, *arguments)
        assert result.exit_code == 2
        assert says in result.stderr


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
    few = ["-o", "meta_steps=1", "-o", "finetune_steps=1", "-o", "search_evaluations=4", "-o", "recalibration=2"]
    result = call("quantize", "test_resnet", "4bit", "--data", tmp_path, "--out", out, "--effort", "smoke", *few)
    assert result.exit_code == 0, result.output
    assert "budget 4bit" in result.stdout


def test_warnings_are_one_line_on_stderr(tmp_path: Path) -> None:
    result = call("quantize", MODEL, "4bit", "--out", tmp_path / "small", "--effort", "smoke", "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("warning: No data was given")
    assert json.loads(result.stdout)["costs"]["weight_bits"] <= 4


def test_a_place_that_cannot_be_written_is_found_out_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = call("quantize", "nowhere:model", "3bit", "--data", DATA, "--out", tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr, "before the model, which is not there, is looked for"


def test_a_budget_above_what_the_widest_widths_take_is_said(tmp_path: Path) -> None:
    options = ["--data", DATA, "--effort", "smoke", "-o", "meta_steps=0", "-o", "finetune_steps=0"]
    assert "widest width" in call("quantize", MODEL, "99%", *options, "--out", tmp_path / "wide").stdout
    assert "widest width" not in call("quantize", MODEL, "3bit", *options, "--out", tmp_path / "narrow").stdout
