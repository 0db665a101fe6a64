from pathlib import Path

from torch import nn

import hq_plugin as hq
from tests.cli.conftest import MODEL, call


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
    result = call("quantize", "tests.cli.test_errors:interrupted", "3bit", "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert "--checkpoint-dir" in result.stderr


def test_wrong_usage_is_exit_code_2_and_plain_text() -> None:
    result = call("quantize", MODEL, "3bit")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Missing option" in result.stderr
