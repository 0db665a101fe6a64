import json
from dataclasses import replace

import pytest

import hq_plugin as hq
from hq_plugin.report import gather
from hq_plugin.report.document import format_cost


def test_json_has_no_infinite_numbers_and_every_field(result: hq.Result) -> None:
    document = replace(gather(result), agreement=float("inf"))
    data = json.loads(json.dumps(document.to_json(), allow_nan=False))
    assert data["format"] == "hq_plugin report"
    assert data["agreement"] is None
    assert data["layers"][0]["name"] == "stem"
    assert set(data) == {"format", "version", *vars(document)}


@pytest.mark.parametrize(
    ("axis", "value", "text"),
    [
        ("weight_bits", 2.5, "2.500 bits"),
        ("size", 1.5e6, "1.5 MB"),
        ("bitops", 2e9, "2 GBitOps"),
        ("latency_ms", 1.25, "1.25 ms"),
        ("energy_uj", 3.0, "3 µJ"),
        ("size", None, ""),
    ],
)
def test_costs_have_units(axis: str, value: float | None, text: str) -> None:
    assert format_cost(axis, value) == text
