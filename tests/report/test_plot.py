import pytest

from hq_plugin.report.plot import Plot, Scale, ticks


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


def test_ticks_are_short_and_written_in_one_manner() -> None:
    assert ticks((0, 2e-5, 1e-4, 0.25, 12000)) == ["0", "2·10⁻⁵", "10⁻⁴", "2.5·10⁻¹", "12k"]
    assert ticks((0.002, 0.25, 1)) == ["0.002", "0.25", "1"]


def test_no_two_ticks_are_written_alike() -> None:
    assert ticks((0.0019752, 0.0019754)) == ["0.0019752", "0.0019754"]
    assert len(set(ticks([5_540_001.0 + n for n in range(5)]))) == 5


def test_values_that_hardly_differ_are_not_blown_up() -> None:
    scale = Scale([0.001975, 0.001977], 0, 100, log=True)
    assert abs(scale(0.001975) - scale(0.001977)) < 1


def test_what_counts_has_whole_ticks() -> None:
    svg = Plot("title", [1, 12], [1, 2], "policies", "y", counts=True).svg()
    assert "2.5<" not in svg
    assert ">10<" in svg


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
