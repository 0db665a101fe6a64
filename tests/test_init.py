"""What `import hq_plugin` does and does not do."""

import json
import subprocess
import sys

import pytest

import hq_plugin

#: Heavy, or somebody else's choice: imported by who needs them.
LAZY = ("timm", "transformers", "onnx", "onnxruntime", "torchao", "nevergrad", "sklearn", "pandas", "rich", "typer")


def imported_by(code: str) -> set[str]:
    code = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("code", ["import hq_plugin as hq; hq.quantize, hq.Session", "import hq_plugin.torch_ao"])
def test_import_is_light(code: str) -> None:
    imported = imported_by(code)
    assert "torch" in imported
    assert not imported & {*LAZY, "matplotlib"}


def test_import_alone_waits_for_nothing() -> None:
    assert not imported_by("import hq_plugin") & {"torch", "numpy", *LAZY}


@pytest.mark.parametrize("name", ["nn", "torch_ao", "errors", "integrations"])
def test_modules_are_attributes_without_an_import_of_their_own(name: str) -> None:
    assert f"hq_plugin.{name}" in imported_by(f"import hq_plugin; hq_plugin.{name}")


def test_what_is_not_there_is_an_attribute_error() -> None:
    assert not hasattr(hq_plugin, "no_such_name")
    with pytest.raises(ImportError):
        exec("from hq_plugin import no_such_name")


def test_everything_public_is_there() -> None:
    assert all(hasattr(hq_plugin, name) for name in hq_plugin.__all__)
    assert sorted(hq_plugin.__all__) == hq_plugin.__all__
    assert set(hq_plugin.__all__) <= set(dir(hq_plugin))
