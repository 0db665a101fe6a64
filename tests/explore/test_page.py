"""The page in a real browser, up to the model that its command makes."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import hq_plugin as hq
from hq_plugin.explore import Server
from tests.browser import Page, needs_browser
from tests.cli.conftest import call
from tests.conftest import TinyNet

pytestmark = needs_browser

LAYER = "#rows .layer:nth-child({})"
IDLE = "document.getElementById('main').getAttribute('aria-busy') === 'false'"


def shown(page: Page, server: Server, start: str = "", **how: Any) -> None:
    page.open("about:blank#")
    page.open(server.url + start, **how)
    page.wait_for(IDLE)


def tile(page: Page, name: str) -> str:
    value = page.evaluate(
        f"""[...document.querySelectorAll('#tiles > div')]
            .find((e) => e.firstChild.textContent.startsWith('{name}'))
            .querySelector('dd').firstChild.textContent"""
    )
    return str(value)


def widths(page: Page) -> list[int]:
    """What is planned for the weights of each layer."""
    page.wait_for(IDLE)
    found: list[int] = page.evaluate(
        "[...document.querySelectorAll('#rows .layer')].map((e) => Number(e.querySelector('.planned').textContent))"
    )
    return found


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_no_error_nothing_from_elsewhere_and_nothing_sticks_out(
    page: Page, server: Server, width: int, dark: bool
) -> None:
    shown(page, server, width=width, dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.overflow() == []
    assert page.console == []
    assert all(url.startswith((server.url, "data:", "blob:")) for url in page.requests)
    assert page.evaluate("document.getElementById('model').textContent") == "TinyNet"


def test_dragging_the_budget_along_the_front_changes_all_predictions(page: Page, server: Server) -> None:
    shown(page, server)
    before = [tile(page, name) for name in ("KL divergence", "size", "effective bits", "BitOps")]
    assert "predicted" in page.evaluate("document.getElementById('tiles').textContent")
    box = page.evaluate(
        "(({right, top}) => [right, top])(document.getElementById('front').getBoundingClientRect())"
    )
    page.drag("#front", (box[0] - 40, box[1] + 60))
    page.wait_for(IDLE)
    after = [tile(page, name) for name in ("KL divergence", "size", "effective bits", "BitOps")]
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert float(after[2]) > float(before[2])
    assert float(after[2]) <= float(page.evaluate("document.getElementById('exact').value")) + 1e-3


def test_the_slider_works_by_keyboard(page: Page, server: Server) -> None:
    shown(page, server)
    page.evaluate("document.getElementById('limit').focus()")
    page.press("Home")
    page.wait_for(IDLE)
    lowest = float(tile(page, "effective bits"))
    page.press("End")
    page.wait_for(IDLE)
    assert float(tile(page, "effective bits")) > lowest
    assert "bits" in page.evaluate("document.getElementById('limit').getAttribute('aria-valuetext')")


def test_a_pinned_layer_keeps_its_width_and_the_others_make_room(page: Page, server: Server) -> None:
    shown(page, server, "#axis=weight_bits&limit=3.3")
    free = widths(page)
    page.click(f"{LAYER.format(1)} input[value='8']")
    page.wait_for("document.getElementById('count').textContent === '1 pinned'")
    pinned = widths(page)
    assert pinned[0] == 8 != free[0]
    assert any(after < before for before, after in zip(free[1:], pinned[1:], strict=True))
    assert float(tile(page, "effective bits")) <= 3.3
    # The address keeps it all, so that a reload finds it again.
    shown(page, server, page.evaluate("location.hash"))
    assert widths(page) == pinned
    page.click("#clear")
    page.wait_for("document.getElementById('count').textContent === 'nothing pinned'")
    assert widths(page) == free


def test_pins_that_the_limit_does_not_allow_raise_it_and_say_so(page: Page, server: Server) -> None:
    shown(page, server, "#axis=weight_bits&limit=2.8&pin=head:8,")
    assert "nothing is below" in page.evaluate("document.getElementById('raised').textContent")
    assert page.evaluate("!document.getElementById('raised').hidden")
    assert widths(page)[3] == 8


def test_another_cost_can_be_limited(page: Page, server: Server) -> None:
    shown(page, server)
    page.click("#axes label:nth-of-type(2)")
    page.wait_for("document.getElementById('unit').textContent === 'bytes'")
    page.wait_for(IDLE)
    assert "bytes of the model" in page.evaluate("document.getElementById('front').textContent")


def test_layers_can_be_found_by_name(page: Page, server: Server) -> None:
    shown(page, server)
    page.evaluate(
        """(() => { const f = document.getElementById('filter');
                    f.value = 'point'; f.dispatchEvent(new Event('input')); })()"""
    )
    assert page.evaluate("[...document.querySelectorAll('#rows .layer')].filter((e) => e.offsetHeight).length") == 1
    assert page.evaluate("document.getElementById('count').textContent") == "1 of 4 shown"


def test_a_screen_reader_finds_names_for_every_control(page: Page, server: Server) -> None:
    shown(page, server)
    unnamed = """[...document.querySelectorAll('input, button, a, fieldset')].filter((e) =>
        !e.ariaLabel && !e.textContent.trim() && !(e.labels && [...e.labels].some((l) => l.textContent.trim())))
        .map((e) => e.outerHTML)"""
    assert page.evaluate(unnamed) == []
    assert "This policy" in page.evaluate("document.getElementById('front').getAttribute('aria-label')")


def test_the_command_makes_the_policy_that_was_downloaded(
    page: Page, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown(page, server, "#axis=weight_bits&limit=3.5&pin=depthwise:8,")
    predicted = float(tile(page, "effective bits"))
    monkeypatch.chdir(tmp_path)
    page.download("#download", tmp_path / "policy.json")
    wanted = json.loads(Path("policy.json").read_text(encoding="utf-8"))
    assert [bits for bits, _ in wanted.values()] == widths(page)
    assert wanted["depthwise"][0] == 8
    words = shlex.split(page.evaluate("document.getElementById('command').textContent"))
    assert words[0] == "hq-plugin"
    result = call(*words[1:])
    assert result.exit_code == 0, result.output
    made = hq.load("small", TinyNet()).hq
    assert made.policy.to_json() == wanted
    assert made.effective_bits == pytest.approx(predicted, abs=1e-3)
