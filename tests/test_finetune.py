"""Fine-tuning: what it may start from."""

from typing import Any

import pytest

from hq_plugin import Config
from hq_plugin.finetune import RETRAINED, possible_starts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"finetune_steps": RETRAINED}, ["float, second_order"]),
        ({"finetune_steps": RETRAINED - 1}, ["float, second_order", "generated, nearest"]),
        ({"effort": "smoke"}, ["float, nearest", "generated, nearest"]),
        ({"finetune_from": "generated"}, ["generated, nearest"]),
        ({"finetune_from": "generated", "rounding": "second_order"}, ["generated, second_order"]),
        ({"finetune_from": "float", "finetune_steps": 1}, ["float, second_order"]),
        ({"finetune_from": "closest", "rounding": "nearest"}, ["float, nearest", "generated, nearest"]),
    ],
)
def test_possible_starts(options: dict[str, Any], expected: list[str]) -> None:
    starts = possible_starts(Config(**options).filled())
    assert [f"{start.finetune_from}, {start.rounding}" for start in starts] == expected
