import json
from pathlib import Path

import hq_plugin as hq
from tests.cli.conftest import DATA, MODEL, call
from tests.conftest import TinyNet


def test_one_session_for_several_budgets_and_for_a_policy(checkpoint: Path, tmp_path: Path) -> None:
    session, float_model = tmp_path / "session", (MODEL, "--checkpoint", checkpoint, "--data", DATA)
    result = call("meta-train", *float_model, "--out", session, "--effort", "smoke", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["sites"] == 4
    assert report["seconds"].keys() == {"sensitivities", "meta_training"}
    assert call("meta-train", *float_model, "--out", session).exit_code == 2, "it is taken"

    def quantized(name: str, *arguments: object) -> hq.Result:
        out = tmp_path / name
        result = call("quantize", *float_model, *arguments, "--session", session, "--out", out, "--json")
        assert result.exit_code == 0, result.output
        return hq.load(out, TinyNet()).hq

    assert quantized("three", "3bit").effective_bits <= 3
    found = quantized("four", "4bit", "-o", "finetune_steps=2")
    assert 3 < found.effective_bits <= 4
    assert len(found.history["finetune"]) == 2, "an option changes what the session says"
    (tmp_path / "policy.json").write_text(json.dumps({**found.policy.to_json(), "head": [8, 8]}))
    assert quantized("given", "--policy", tmp_path / "policy.json").policy["head"] == hq.LayerBits(8, 8)
