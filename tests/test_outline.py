import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

import hq_plugin as hq
from hq_plugin import ArtifactError
from hq_plugin.outline import read_outline, read_table, write_outline, write_table
from hq_plugin.session import Session


@pytest.fixture(scope="module")
def session(trained: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Session:
    options: dict[str, Any] = {"pinned": {"stem": [8, 8]}, "meta_steps": 1, "search_evaluations": 12}
    made = hq.meta_train(trained, batches, effort="smoke", activation_bits=(4, 8), **options)
    made.search("4bit")
    made.source = ("module:function", "--data", "digits")
    return made


@pytest.fixture
def content(session: Session) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(json.dumps(write_outline(session, "net", "loss"), allow_nan=False))
    return written


def test_space_costs_and_scores_come_back(session: Session, content: dict[str, Any]) -> None:
    outline = read_outline(content, json.loads(json.dumps(write_table(session.sensitivities))))
    assert outline.space == session.space
    assert np.array_equal(outline.costs.bitops, session.costs.bitops)
    assert np.array_equal(outline.sensitivities, session.sensitivities)
    assert outline.costs.latency is None
    assert (outline.model, outline.distance, outline.source) == ("net", "loss", session.source)
    best = {scored.genome.tobytes(): scored.score for scored in session.scored}
    assert {genome.tobytes(): score for genome, score in outline.scored} == best
    assert best


def test_dynamic_inputs_come_back(trained: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    options: dict[str, Any] = {"meta_steps": 1, "activation_scheme": "dynamic"}
    made = hq.meta_train(trained, batches, effort="smoke", **options)
    outline = read_outline(write_outline(made, "net", "loss"), write_table(made.sensitivities))
    assert outline.space == made.space
    assert outline.space.policy(outline.space.top)["head"].dynamic


def test_latency_comes_back(session: Session) -> None:
    session.costs.latency = np.where(np.isfinite(session.costs.bitops), 0.25, np.inf)
    session.costs.latency_rest, session.costs.latency_batch = 0.5, 4
    try:
        content = json.loads(json.dumps(write_outline(session, "net", "loss"), allow_nan=False))
    finally:
        session.costs.latency = None
    outline = read_outline(content, write_table(session.sensitivities))
    assert outline.costs.costs(outline.space.top).latency_ms == pytest.approx(0.25 * 4 + 0.5)
    assert outline.costs.latency_batch == 4


def test_tables_keep_what_is_no_choice(session: Session) -> None:
    table = session.sensitivities
    assert np.isinf(table).any(), "one group is pinned"
    assert np.array_equal(read_table(write_table(table)), table)


@pytest.mark.parametrize(
    "damage",
    [
        {"sites": [{"name": "a"}]},
        {"sites": []},
        {"groups": []},
        {"float_bytes": "many"},
        {"scored": {"9999": 0.1}},
        {"scored": {"x": 0.1}},
        {"scored": ["0000"]},
        {"finetune_steps": -1},
        {"finetune_steps": float("inf")},
        {"finetune_steps": "many"},
        {"latency": {"table": [[[1.0]]], "rest": 0, "batch": 1}},
    ],
)
def test_damage_is_a_clean_error(session: Session, content: dict[str, Any], damage: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="outline"):
        read_outline({**content, **damage}, write_table(session.sensitivities))


def test_sensitivities_of_another_space_are_an_error(session: Session, content: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="another search space"):
        read_outline(content, write_table(session.sensitivities[:2]))
    with pytest.raises(ArtifactError, match="second order of another"):
        read_outline(content, write_table(session.sensitivities), write_table(session.sensitivities[:2, :, :1]))


def test_scores_that_are_not_finite_are_left_out(session: Session) -> None:
    scored = session.scored
    session.scored = [replace(scored[0], score=float("nan")), replace(scored[1], score=0.5)]
    try:
        assert list(write_outline(session, "net", "loss")["scored"].values()) == [0.5]
    finally:
        session.scored = scored
