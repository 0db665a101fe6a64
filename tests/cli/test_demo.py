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
