import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
import typer

import hq_plugin
from hq_plugin.cli import app
from hq_plugin.distribution import in_job, leave
from tests.cli.conftest import DATA, MODEL, call

COMMANDS = typer.main.get_command(app).commands


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hq_plugin", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_and_the_common_options(name: str) -> None:
    result = call(name, "--help")
    assert result.exit_code == 0
    examples = result.stdout.partition("Examples:\n")[2].splitlines()
    assert examples[0].strip().startswith(f"hq-plugin {name}")
    assert "--debug" in result.stdout
    assert "--json" in result.stdout


def test_help_says_the_exit_codes_and_no_line_is_cut() -> None:
    shown = call("--help").stdout
    assert set(COMMANDS) <= set(shown.split())
    assert all(f"\n    {code}" in shown for code in (0, 1, 2, 130))
    assert "..." not in shown.partition("Commands:")[2]


def test_examples_name_options_that_exist() -> None:
    for name, command in COMMANDS.items():
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for line in call(name, "--help").stdout.splitlines():
            if line.strip().startswith(f"hq-plugin {name} "):
                words = line.partition("|")[0].split()
                assert {word for word in words if word.startswith("-")} <= known, line


def test_help_does_not_wait_for_torch() -> None:
    code = """
import sys
from hq_plugin.cli import app
for arguments in sys.argv[1:]:
    app(arguments.split(), standalone_mode=False)
print("torch imported:", "torch" in sys.modules)
"""
    asked = ["--help", "--version", *(f"{name} --help" for name in COMMANDS)]
    result = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True, check=True)
    assert result.stdout.count("Usage:") == 1 + len(COMMANDS)
    assert result.stdout.splitlines()[-1] == "torch imported: False"


def test_version() -> None:
    assert call("--version").stdout == f"hq-plugin {hq_plugin.__version__}\n"


def test_as_a_module_and_its_exit_code(tmp_path: Path) -> None:
    result = run("inspect", tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" in run("inspect", tmp_path, "--debug").stderr


def test_shell_completion() -> None:
    result = run(_HQ_PLUGIN_COMPLETE="complete_bash", COMP_WORDS="hq-plugin meta", COMP_CWORD="1")
    assert result.stdout.split() == ["meta-train"]


def test_a_path_may_begin_with_the_home_directory(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    refused = call("quantize", MODEL, "3bit", "--data=missing.npz", f"--out=~/{saved.name}")
    assert "--overwrite" in refused.stderr, "the place is looked at before the work"
    monkeypatch.setenv("HOME", str(tmp_path))
    untrained = ["-o", "meta_steps=0", "-o", "finetune_steps=0"]
    result = call("quantize", MODEL, "3bit", "--data", DATA, "--effort", "smoke", *untrained, "--out=~/fresh")
    written = (tmp_path / "fresh" / "model.safetensors").stat().st_size
    assert f"saved to {tmp_path / 'fresh'}: {written:,} bytes" in result.stdout, result.output
    (tmp_path / "a.npz").touch()
    assert "is no .npz file" in call("quantize", MODEL, "3bit", "--data=~/a.npz", "--out=~/b").stderr


def test_a_command_leaves_the_job_that_it_was_part_of(saved: Path, tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert call("inspect", tmp_path / "none").exit_code == 2
        assert in_job(), "the others may still be at it"
        assert call("inspect", saved).exit_code == 0
        assert not in_job()
    finally:
        leave()
