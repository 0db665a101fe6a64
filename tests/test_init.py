"""What `import hq_plugin` does and does not do."""

import json
import subprocess
import sys

import pytest

import hq_plugin

#: Heavy, or somebody else's choice: imported by who needs them.
LAZY = ("timm", "transformers", "onnx", "onnxruntime", "torchao", "nevergrad", "sklearn", "pandas", "rich", "typer")


@pytest.mark.parametrize("module", ["hq_plugin", "hq_plugin.torch_ao"])
def test_import_is_light(module: str) -> None:
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(json.loads(done.stdout))
    assert "torch" in imported
    assert not imported & {*LAZY, "matplotlib"}


def test_everything_public_is_there() -> None:
    assert all(hasattr(hq_plugin, name) for name in hq_plugin.__all__)
    assert sorted(hq_plugin.__all__) == hq_plugin.__all__
