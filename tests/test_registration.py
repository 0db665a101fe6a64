import os
import subprocess
import sys
from pathlib import Path

import pytest

from hq_plugin import HQWarning, registration


def run(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "some_library").mkdir()
    (tmp_path / "some_library" / "__init__.py").write_text("")
    (tmp_path / "some_library" / "registry.py").write_text("METHODS = []\n")
    (tmp_path / "ours.py").write_text("from some_library.registry import METHODS\nMETHODS.append('hq')\n")
    (tmp_path / "broken.py").write_text("from some_library.registry import NOT_THERE\n")
    return tmp_path


@pytest.mark.parametrize("first", ["hq_plugin", "some_library.registry"])
def test_it_registers_whichever_is_imported_first(library: Path, first: str) -> None:
    setup = "from hq_plugin import registration\nregistration.REGISTRIES['some_library.registry'] = 'ours'\n"
    lines = [f"{setup}registration.install()", "import some_library.registry"]
    code = "\n".join(lines if first == "hq_plugin" else lines[::-1]) + "\nprint(some_library.registry.METHODS)"
    done = run(code, library)
    assert done.stdout.strip() == "['hq']", done.stderr


def test_a_library_that_it_does_not_fit_goes_on_working(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(library))
    monkeypatch.setattr(registration, "REGISTRIES", {"some_library.registry": "broken"})
    with pytest.warns(HQWarning, match="Upgrade the library"):
        import some_library.registry
    assert some_library.registry.METHODS == []


def test_importing_the_plugin_imports_no_library(tmp_path: Path) -> None:
    code = (
        "import sys, hq_plugin; print([name for name in ('transformers', 'timm', 'peft') if name in sys.modules])"
    )
    assert run(code, tmp_path).stdout.strip() == "[]"
