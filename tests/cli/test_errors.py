from pathlib import Path

import pytest
from torch import nn

import hq_plugin as hq
from tests.cli.conftest import DATA, MODEL, call


def broken() -> nn.Module:
    raise KeyError("mine")


def interrupted() -> nn.Module:
    raise KeyboardInterrupt


def test_an_error_in_the_code_of_a_user_has_another_exit_code(tmp_path: Path) -> None:
    arguments = ("quantize", "tests.cli.test_errors:broken", "3bit", "--out", tmp_path / "out")
    result = call(*arguments)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == ["error: KeyError: 'mine' (--debug shows the traceback)"]
    assert isinstance(call(*arguments, "--debug").exception, KeyError)


def test_debug_raises(tmp_path: Path) -> None:
    assert isinstance(call("inspect", tmp_path, "--debug").exception, hq.ArtifactError)
    assert call("inspect", tmp_path).exit_code == 2


def test_interruption(tmp_path: Path) -> None:
    model = "tests.cli.test_errors:interrupted"
    result = call("quantize", model, "3bit", "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert "--checkpoint-dir" in result.stderr
    result = call("profile", model, "--data", DATA, "--out", tmp_path / "profile.json")
    assert (result.exit_code, result.stderr) == (130, "error: Interrupted.\n")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("quantize", MODEL, "3bit"), "Missing option '--out'"),
        (("quantize", MODEL, "3bit", "--ot", "x"), "--out"),
        (("quantize", MODEL, "3bit", "--out", "x", "--effort", "much"), "'balanced'"),
        (("quantize", MODEL, "3bit", "--out", "x", "--seed", "one"), "valid integer"),
        (("inspect",), "Missing argument 'directory'"),
        (("quantise",), "No such command"),
    ],
)
def test_wrong_usage_is_one_line(arguments: tuple[str, ...], told: str) -> None:
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert told in line
    assert "--help lists what is possible." in line


def test_no_command_shows_the_help() -> None:
    result = call()
    assert result.exit_code == 2
    assert "Examples:" in result.output


def test_help_and_version_succeed() -> None:
    assert call("--version").exit_code == call("quantize", "--help").exit_code == 0
