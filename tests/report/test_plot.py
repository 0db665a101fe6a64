import pytest

from hq_plugin.report.plot import Plot, Scale, tick


def test_a_scale_maps_its_ends_inside_and_keeps_the_order() -> None:
    for log in (False, True):
        scale = Scale([1, 10, 100], 0, 300, log=log)
        places = [scale(value) for value in (1, 10, 100)]
        assert 0 <= places[0] < places[1] < places[2] <= 300
        assert 3 <= len(scale.ticks()) <= 8
    assert Scale([1, 10, 100], 0, 300, log=True)(10) == pytest.approx(150)


@pytest.mark.parametrize("values", [[3.0], [0.0], [1e-7, 1.00001e-7], []])
def test_a_scale_without_a_range_still_has_ticks(values: list[float]) -> None:
    assert Scale(values, 0, 100).ticks()


def test_ticks_are_short() -> None:
    assert [tick(v) for v in (0, 2e-5, 1e-4, 0.25, 12000)] == ["0", "2·10⁻⁵", "10⁻⁴", "0.25", "12k"]


def test_marks_with_a_description_can_be_reached_and_lines_are_lines() -> None:
    plot = Plot("title", [0, 1], [1, 2], "x", "y <unit>")
    plot.mark(0.5, 1.5, "dot", "kind", 'what & "why"')
    plot.line([(0, 1), (1, 2)], "steps", steps=True)
    plot.line([], "nothing")
    svg = plot.svg()
    assert "<title>what &amp; &quot;why&quot;</title>" in svg
    assert "y &lt;unit&gt;" in svg
    assert 'class="steps"' in svg
    assert "nothing" not in svg
