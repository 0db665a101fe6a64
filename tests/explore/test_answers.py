import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from hq_plugin import HybridPolicy
from hq_plugin.explore import Answers
from hq_plugin.outline import Outline


@pytest.fixture
def answers(outline: Outline, saved_session: Path) -> Answers:
    return Answers(outline, saved_session)


def test_the_page_gets_the_session_as_json(answers: Answers) -> None:
    data = json.loads(json.dumps(answers.data(), allow_nan=False))
    assert data["model"] == "TinyNet"
    assert [group["name"] for group in data["groups"]] == ["stem", "depthwise", "pointwise", "head"]
    assert [axis["name"] for axis in data["axes"]] == ["weight_bits", "size", "bitops", "energy_uj"]
    head = data["groups"][-1]
    assert head["shape"] == [10, 64]
    assert head["bytes"] == sorted(head["bytes"])
    assert data["scored"]


def test_a_plan_keeps_limit_and_pins(answers: Answers) -> None:
    question = {"axis": "size", "limit": 900, "pins": {"stem": [8, None]}, "front": True}
    plan = json.loads(json.dumps(answers.plan(question), allow_nan=False))
    assert plan["size"] <= 900
    assert plan["widths"][0][0] == 8
    assert HybridPolicy.from_json(plan["policy"])["stem"].weight == 8
    assert plan["least"] == plan["front"][0]["size"]
    assert not plan["raised"]
    assert "front" not in answers.plan({**question, "front": False})


def test_a_limit_that_pins_do_not_allow_is_raised_and_said(answers: Answers) -> None:
    plan = answers.plan({"axis": "weight_bits", "limit": 2.8, "pins": {"head": [8, None]}})
    assert plan["raised"]
    assert plan["limit"] == plan["least"] > 2.8
    assert plan["weight_bits"] <= plan["limit"] * (1 + 1e-6)


def test_the_command_names_the_model_where_it_is_known(answers: Answers, outline: Outline) -> None:
    words = shlex.split(answers.command())
    assert words[:3] == ["hq-plugin", "quantize", "tests.conftest:TinyNet"]
    assert words[words.index("--session") + 1] == answers.directory
    assert "MODEL" in Answers(replace(outline, source=()), "my sessions/one").command()
    assert "'my sessions/one'" in Answers(outline, "my sessions/one").command()
