import json
from pathlib import Path

import pytest

import hq_plugin.integrations.timm as hq_timm
from hq_plugin.integrations.timm import demo
from tests.cli.conftest import call


def test_rows_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.SETTINGS, "digits", demo.Setting(float_epochs=1, meta_steps=2, finetune_steps=2))
    result = call("demo", "--json", "--out", tmp_path / "small")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert rows[0]["name"] == "float"
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert hq_timm.load(tmp_path / "small").hq.effective_bits <= 2.5


def test_a_saved_model_is_replaced_only_if_asked_for(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def run(data: str, directory: Path, *, overwrite: bool) -> list[demo.Row]:
        asked.append(overwrite)
        return []

    monkeypatch.setattr(demo, "run", run)
    refused = call("demo", "--out", saved)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert not asked, "before the work"
    assert call("demo", "--out", saved, "--overwrite", "--json").exit_code == 0
    assert call("demo", "--out", tmp_path / "new", "--json").exit_code == 0
    assert asked == [True, False]
