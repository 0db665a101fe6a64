import json
import math
from dataclasses import replace

import pytest

import hq_plugin as hq
from hq_plugin.compact import compact, expand
from hq_plugin.report import gather


def test_what_was_measured_arrives(result: hq.Result) -> None:
    document = gather(result)
    assert document.model == "TinyNet"
    assert document.distance_name == "KL divergence"
    assert document.candidates[0].name == "float"
    assert document.candidates[-1].name == "result"
    assert {"uniform", "dynamic_programming"} <= {c.name for c in document.candidates} | {document.chosen}
    assert [c.name for c in document.candidates if c.chosen] == [result.chosen]
    assert document.result.size == result.size
    (limit,) = document.limits
    assert limit.limit == pytest.approx(3)
    assert limit.spent == result.effective_bits
    assert [layer.name for layer in document.layers] == list(result.policy)
    assert all(layer.sensitivity is not None and math.isfinite(layer.sensitivity) for layer in document.layers)
    assert {name for group in document.float_layers for name in group.layers} == {"bn1", "bn2"}
    assert {stage.name for stage in document.stages} >= {"sensitivities", "meta_training", "search", "finetune"}
    assert all(stage.memory for stage in document.stages if stage.part_of is None)
    assert document.seed == 0
    assert len(document.policies) == document.policies_scored > 1
    assert not document.gaps


def test_the_range_of_a_quantized_input_is_that_of_its_integers(result: hq.Result) -> None:
    for layer, report in zip(gather(result).layers, result.layers, strict=True):
        assert layer.activation_low is not None
        assert layer.activation_high is not None
        steps = (layer.activation_high - layer.activation_low) / report.activation_step
        assert steps == pytest.approx(2**report.activation_bits - 1)


def test_a_front_lies_over_the_first_limit(result: hq.Result) -> None:
    assert gather(result).front_axis == "weight_bits"
    assert gather(replace(result, used={"size_fraction": 0.9})).front_axis == "size"
    front = gather(result).front
    assert [point.weight_bits for point in front] == sorted(point.weight_bits for point in front)
    assert [point.predicted for point in front] == sorted((point.predicted for point in front), reverse=True)


def test_what_is_missing_is_said(result: hq.Result) -> None:
    bare = replace(result, sensitivities=[], memory={}, history={}, accuracy=None)
    said = " ".join(gather(bare).gaps)
    assert all(word in said for word in ("Sensitivities", "Memory", "history", "labels"))
    assert "given" in " ".join(gather(replace(bare, chosen="given")).gaps)


def test_a_saved_result_gives_the_same_report_but_for_thinned_histories(result: hq.Result) -> None:
    before = gather(result)
    after = gather(expand(json.loads(json.dumps(compact(result)))))
    assert after.policies_scored == before.policies_scored
    assert after.candidates == before.candidates
    assert [layer.name for layer in after.layers] == [layer.name for layer in before.layers]
    for old, new in zip(before.layers, after.layers, strict=True):
        assert new.sensitivity == pytest.approx(old.sensitivity, rel=1e-3, abs=1e-6)
