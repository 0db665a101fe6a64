import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import hq_plugin as hq
from hq_plugin.artifact import read_info
from hq_plugin.cli.output import print_result, say_json


def test_a_number_that_is_not_finite_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    say_json({"kl": math.inf, "history": [math.nan, 1.5], "name": "a"})
    assert capsys.readouterr().out == '{"kl": null, "history": [null, 1.5], "name": "a"}\n'


def test_the_widest_widths_are_those_that_a_layer_might_choose(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    options = {"effort": "smoke", "meta_steps": 0, "finetune_steps": 0, "weight_bits": (2, 8)}
    for budget, widest in (("5bit", False), ("20bit", True)):
        print_result(hq.quantize(nn.Linear(64, 8), budget, [torch.randn(8, 64)] * 4, **options).hq)
        assert ("widest width" in capsys.readouterr().out) == widest, budget


def test_a_result_that_does_not_know_what_a_layer_might_choose(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = read_info(saved).result
    assert result is not None
    print_result(replace(result, sensitivities=[], used={"size": 0.5}))
    assert "widest width" not in capsys.readouterr().out
