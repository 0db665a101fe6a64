"""The page with 400 layers: what a large model needs beyond what a small one shows."""

import threading
from collections.abc import Iterator

import pytest

from hq_plugin.explore import Answers, Server
from tests.browser import Page, needs_browser
from tests.explore.large import large_outline
from tests.explore.test_page import IDLE, shown

pytestmark = needs_browser


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(Answers(large_outline(), "large")) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


@pytest.mark.parametrize("width", [360, 1440])
def test_the_budget_stays_near_and_a_layer_is_found_by_name(page: Page, server: Server, width: int) -> None:
    shown(page, server, width=width)
    assert page.evaluate("document.querySelectorAll('#rows .layer').length") == 400
    assert page.evaluate("document.documentElement.scrollHeight") < 4000, "layers scroll in a box of their own"
    page.evaluate(
        """(() => {
            const filter = document.getElementById('filter');
            filter.value = 'LM_HEAD';
            filter.dispatchEvent(new Event('input'));
        })()"""
    )
    assert page.evaluate("[...document.querySelectorAll('#rows .layer')].filter((e) => e.offsetHeight).length") == 1
    page.click("#rows .layer:last-child .widths label.width:last-child")
    page.wait_for("location.hash.includes('pin=lm_head')")
    page.wait_for(IDLE)
    assert page.overflow() == []
    assert page.console == []


def test_of_many_limits_the_last_one_is_planned(page: Page, server: Server) -> None:
    shown(page, server)
    page.evaluate(
        """(() => {
            const slider = document.getElementById('limit');
            for (let n = 0; n <= 1000; n += 50) {
                slider.value = n;
                slider.dispatchEvent(new Event('input'));
            }
            slider.value = 250;
            slider.dispatchEvent(new Event('input'));
        })()"""
    )
    page.wait_for(IDLE)
    least, most = (float(server.answers.plan({"axis": "weight_bits", "limit": n})["limit"]) for n in (0, 99))
    shown_limit = float(page.evaluate("new URLSearchParams(location.hash.slice(1)).get('limit')"))
    assert shown_limit == pytest.approx(least + (most - least) / 4, rel=1e-6)
    assert len([url for url in page.requests if url.endswith("/plan")]) < 8, "those in between are passed over"
