import json
from pathlib import Path

import pytest
from torch import Tensor, nn

import hq_plugin as hq
from hq_plugin import ArtifactError
from hq_plugin.compact import HISTORY, REPORT_FILE, compact, expand, read_beside, write_beside
from hq_plugin.result import Result


@pytest.fixture(scope="module")
def result(trained: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Result:
    options = {"meta_steps": 130, "finetune_steps": 1, "search_evaluations": 12}
    small = hq.quantize(trained, "4bit", batches, effort="smoke", **options)
    found: Result = small.hq
    return found


def test_what_decides_is_exact_and_histories_are_thinned(result: Result) -> None:
    text = json.dumps(compact(result))
    again = expand(json.loads(text))
    assert again.policy == result.policy
    assert again.costs == result.costs
    assert again.baselines == result.baselines
    assert len(result.history["meta_training"]) == 130
    assert 2 < len(again.history["meta_training"]) <= HISTORY + 1
    assert again.history["meta_training"][-1]["step"] == result.history["meta_training"][-1]["step"]
    assert len(text) < len(json.dumps(result.to_json())) / 2


def test_beside_a_model(result: Result, tmp_path: Path) -> None:
    assert read_beside(tmp_path) is None
    assert write_beside(result, tmp_path).name == REPORT_FILE
    found = read_beside(tmp_path)
    assert found is not None
    assert found.policy == result.policy


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 10_000, '{"history": 3}', "\x00"])
def test_damage_is_a_clean_error(tmp_path: Path, text: str) -> None:
    (tmp_path / REPORT_FILE).write_text(text)
    with pytest.raises(ArtifactError, match="damaged"):
        read_beside(tmp_path)
