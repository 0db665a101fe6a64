"""The package as others get it: what the wheel holds, and that it works installed and away from the sources."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Source folder, and where it lies in the wheel.
SOURCES = {"hq_plugin": "hq_plugin", "integrations": "hq_plugin/integrations"}


def test_every_package_is_declared() -> None:
    """A new folder that pyproject.toml does not name would be missing from the wheel."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = set()
    for folder, place in SOURCES.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([*place.split("/"), *path.parent.relative_to(ROOT / folder).parts]))
    assert sorted(declared) == sorted(found)


@pytest.mark.slow
def test_sdist_and_wheel_work_installed(tmp_path: Path) -> None:
    source, dist = tmp_path / "source", tmp_path / "dist"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    # The wheel is built from the sdist, so that works, too.
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source], check=True)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    assert sdist.stat().st_size > 10_000
    expected = {
        name.replace(folder, place, 1)
        for folder, place in SOURCES.items()
        for name in tracked.splitlines()
        if name.startswith(f"{folder}/")
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert "hq_plugin/py.typed" in held

    # A new environment that borrows the dependencies of this one, but not its hq_plugin.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (library,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (library / "dependencies.pth").write_text("\n".join(borrowed))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--force-reinstall", wheel], check=True)
    shutil.copy(ROOT / "tests" / "installed.py", tmp_path / "check.py")
    done = subprocess.run([python, "check.py", library], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = subprocess.run([python.parent / "hq-plugin", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("hq-plugin ")
