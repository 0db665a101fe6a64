import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import hq_plugin as hq
from hq_plugin.explore import Answers
from hq_plugin.session_store import read_session_outline
from tests.browser import browser, needs_browser
from tests.cli.conftest import DATA, MODEL, call
from tests.conftest import digits_batches


@pytest.fixture(scope="module")
def session(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("explore") / "session"
    arguments = [MODEL, "--checkpoint", checkpoint, "--data", DATA, "--effort", "smoke", "-o", "meta_steps=2"]
    result = call("meta-train", *arguments, "--out", out)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def running(session: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "hq_plugin", "explore", str(session), "--json"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        yield process, json.loads(process.stdout.readline())["url"]
    finally:
        process.kill()
        process.communicate()


@needs_browser
def test_serves_until_it_is_interrupted_and_then_the_page_says_so(
    running: tuple[subprocess.Popen[str], str],
) -> None:
    process, url = running
    with urllib.request.urlopen(f"{url}data.json") as answer:
        data = json.load(answer)
    assert data["command"].startswith(f"hq-plugin quantize {MODEL} --checkpoint ")
    with browser() as page:
        page.open(url)
        page.wait_for("document.querySelectorAll('#rows .planned').length > 0")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0
        assert stderr == "ended\n"
        page.evaluate("document.getElementById('limit').focus()")
        page.press("End")
        page.wait_for("!document.getElementById('problem').hidden")
        assert "Start it again" in page.evaluate("document.getElementById('problem').textContent")


def test_a_profile_of_another_runtime_is_refused(trained: nn.Module, session: Path, tmp_path: Path) -> None:
    options = {"weight_bits": 8, "activation_bits": 8, "progress": False}
    made = hq.profile(trained, digits_batches(), target="onnxruntime", **options)  # type: ignore[arg-type]
    result = call("explore", session, "--profile", made.save(tmp_path / "profile.json"))
    assert result.exit_code == 2
    assert "The profile is of target='onnxruntime', and target='storage' runs on other kernels" in result.stderr


def test_the_command_has_the_seed_that_the_model_was_made_with(checkpoint: Path, tmp_path: Path) -> None:
    arguments = [MODEL, "--checkpoint", checkpoint, "--data", DATA, "--effort", "smoke", "-o", "meta_steps=2"]
    assert call("meta-train", *arguments, "--seed", 3, "--out", tmp_path / "session").exit_code == 0
    outline = read_session_outline(tmp_path / "session")
    assert outline.target == "storage"
    assert " --seed 3 " in Answers(outline, "session").command()


@pytest.mark.parametrize("arguments", [("missing",), ("--profile", "missing.json"), ("--port", "70000")])
def test_errors_have_exit_code_2(session: Path, arguments: tuple[str, ...]) -> None:
    given = arguments if arguments == ("missing",) else (session, *arguments)
    result = call("explore", *given)
    assert result.exit_code == 2
    assert result.stderr
