from dataclasses import replace

import pytest

import hq_plugin as hq
from hq_plugin.errors import ConfigError
from hq_plugin.report.figures import PANELS
from tests.report.conftest import Many


def test_every_panel_and_all_of_them(result: hq.Result) -> None:
    for what in PANELS:
        (axes, *_) = result.plot(what).axes
        assert axes.get_ylabel()
    assert len(result.plot().axes) >= len(PANELS)


def test_widths_are_the_policy(many: Many) -> None:
    (axes,) = many(100).plot("widths").axes
    assert [bar.get_height() for bar in axes.patches] == [1 + n % 8 for n in range(100)]
    assert axes.get_xlabel() == "100 layers, in order"


def test_what_is_not_there_is_an_error_that_says_so(result: hq.Result) -> None:
    with pytest.raises(ConfigError, match="overview, widths"):
        result.plot("pie")
    with pytest.raises(ConfigError, match="not kept"):
        replace(result, history={}).plot("search")
