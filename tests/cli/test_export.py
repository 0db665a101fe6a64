import json
from pathlib import Path

from tests.cli.conftest import DATA, MODEL, call


def test_onnx(saved: Path, tmp_path: Path) -> None:
    arguments = ("export", saved, "--out", tmp_path / "m.onnx", "--model", MODEL)
    result = call(*arguments, "--data", DATA)
    assert result.exit_code == 0, result.output
    assert all(f"{name}: " in result.stdout for name in ("stem", "depthwise", "pointwise", "head"))
    assert (tmp_path / "m.onnx").stat().st_size > 1000
    written = json.loads(call(*arguments, "--data", DATA, "--json").stdout)
    assert written["size"] == (tmp_path / "m.onnx").stat().st_size
    assert written["layers"].keys() == {"stem", "depthwise", "pointwise", "head"}
    result = call(*arguments)
    assert result.exit_code == 2
    assert "--data" in result.stderr
