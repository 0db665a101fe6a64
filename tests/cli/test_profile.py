import json
from pathlib import Path

import hq_plugin as hq
from tests.cli.conftest import DATA, MODEL, call


def test_a_profile_and_a_budget_of_latency(tmp_path: Path) -> None:
    widths = ["--weight-bits", "4,8", "--activation-bits", "8"]
    result = call("profile", MODEL, "--data", DATA, "--out", tmp_path / "p.json", *widths, "--json")
    assert result.exit_code == 0, result.output
    profile = hq.Profile.load(tmp_path / "p.json")
    assert len(profile.layers) == 4
    assert json.loads(result.stdout)["layers"] == profile.layers
    arguments = ["--data", DATA, "--effort", "smoke", "--profile", tmp_path / "p.json", "--out", tmp_path / "small"]
    result = call("quantize", MODEL, "1000s", *arguments, "--target", "torch", *widths)
    assert result.exit_code == 0, result.output


def test_a_profile_of_several_samples(tmp_path: Path) -> None:
    widths = ["--weight-bits", "8", "--activation-bits", "8"]
    result = call("profile", MODEL, "--data", DATA, "--out", tmp_path / "p.json", "--batch", 8, *widths)
    assert result.exit_code == 0, result.output
    untrained = ["--effort", "smoke", "-o", "meta_steps=0", "-o", "finetune_steps=0"]
    arguments = ["--data", DATA, "--profile", tmp_path / "p.json", "--out", tmp_path / "small", *untrained, *widths]
    assert '"1000ms for 8 samples"' in call("quantize", MODEL, "1s", *arguments).stderr
    result = call("quantize", MODEL, "1s for 8 samples", *arguments)
    assert result.exit_code == 0, result.output


def test_a_place_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    result = call("profile", "no.module:model", "--out", tmp_path)
    assert result.exit_code == 2
    assert "is a directory. Give a file" in result.stderr


def test_lines_for_people(tmp_path: Path) -> None:
    widths = ["--weight-bits", "8", "--activation-bits", "8"]
    result = call("profile", MODEL, "--data", DATA, "--out", tmp_path / "p.json", *widths)
    assert len(result.stdout.splitlines()) == 5
    assert result.stdout.count("8,8: ") == 4
    assert "(int8)" in result.stdout or "(dequantized)" in result.stdout
    assert str(tmp_path / "p.json") in result.stdout


def test_without_options_it_has_the_widths_that_quantize_and_meta_train_choose_from(tmp_path: Path) -> None:
    result = call("profile", MODEL, "--data", DATA, "--out", tmp_path / "p.json")
    assert result.exit_code == 0, result.output
    (layer, *_) = hq.Profile.load(tmp_path / "p.json").layers.values()
    assert layer.keys() == {f"{bits},8" for bits in hq.Config().weight_bits}
