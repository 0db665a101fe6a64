import json
from pathlib import Path

import pytest

from tests.cli.conftest import call


def test_writes_a_page_without_the_model(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("report", saved)
    assert result.exit_code == 0, result.output
    assert result.stdout == "wrote report.html\n"
    assert "TinyNet" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_prints_the_data_of_the_page_and_writes_only_what_is_asked_for(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.svg"
    data = json.loads(call("report", saved, "--json", "--out", out).stdout)
    assert [layer["name"] for layer in data["layers"]] == ["stem", "depthwise", "pointwise", "head"]
    assert out.read_text(encoding="utf-8").startswith("<?xml")


@pytest.mark.parametrize("name", ["report.doc", "missing/small"])
def test_errors(saved: Path, tmp_path: Path, name: str) -> None:
    arguments = (saved, "--out", tmp_path / name) if name.startswith("report") else (tmp_path / name,)
    result = call("report", *arguments)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_folder_of_hugging_face_without_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = call("report", tmp_path)
    assert result.exit_code == 2
    assert "no report (hq_result.json)" in result.stderr
    assert "from_pretrained" not in result.stderr
