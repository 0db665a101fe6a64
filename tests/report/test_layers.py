import re
from dataclasses import replace

import pytest

import hq_plugin as hq
from hq_plugin.report import gather
from hq_plugin.report.layers import ROWS, activations_table, layers_figure, layers_table, stages
from tests.report.conftest import Many


@pytest.mark.parametrize("count", [1, 20, 400])
def test_every_layer_is_in_the_chart_once_with_its_description(many: Many, count: int) -> None:
    document = gather(many(count))
    html = layers_figure(document)
    assert ("stages" in html) == (count > ROWS)
    named = re.findall(r"(?:<title>|title=\")(model\.[\w.]+)\n", html)
    assert named == [layer.name for layer in document.layers]
    assert html.count("heat chosen") == count


def test_stages_are_runs_of_one_block_that_a_phone_can_show(many: Many) -> None:
    document = gather(many(400))
    found = stages(document.layers)
    assert [layer for _, run in found for layer in run] == list(document.layers)
    assert max(len(run) for _, run in found) <= 22
    assert len(found) <= 400 / 3
    assert len({label for label, _ in found}) == len(found)
    label, run = found[1]
    begin, end = (run[at].name.split(".")[2] for at in (0, -1))
    assert label == f"model.layers.{begin} to {end}"


def test_tables_say_the_same(result: hq.Result) -> None:
    document = gather(result)
    table = layers_table(document)
    assert all(f'<th scope="row">{layer.name}</th>' in table for layer in document.layers)
    assert "<td>8 × 1 × 3 × 3</td>" in table
    assert activations_table(document).count("<rect") == 4


def test_float_inputs_have_no_range(result: hq.Result) -> None:
    layers = [
        replace(layer, activation_bits=16, activation_step=None, activation_zero_point=None)
        for layer in result.layers
    ]
    assert activations_table(gather(replace(result, layers=layers))) == ""
