"""What the tests of the command line share: calling it, and a model that it saved."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

from hq_plugin.cli import app

MODEL, DATA = "tests.conftest:TinyNet", "tests.conftest:digits_batches"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def checkpoint(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "float.safetensors"
    save_file(trained.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def saved(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "small"
    arguments = ["--data", DATA, "--checkpoint", checkpoint, "--effort", "smoke", "--activation-bits", "4,8"]
    result = call("quantize", MODEL, "3bit", *arguments, "--out", out)
    assert result.exit_code == 0, result.output
    assert "fine-tuned" in result.stdout
    return out
