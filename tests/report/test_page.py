import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import hq_plugin as hq
from hq_plugin.report import page as write_page
from hq_plugin.report import summary
from tests.browser import Page, needs_browser
from tests.report.conftest import Many

WIDTHS = (360, 768, 1440)


def shown(page: Page, result: hq.Result, path: Path, **how: object) -> None:
    page.open(result.report(path / "report.html").as_uri(), **how)  # type: ignore[arg-type]


def test_it_needs_nothing_from_elsewhere(result: hq.Result) -> None:
    html = write_page(result)
    assert not re.search(r"(src|href)=\"(?!#|data:)", html)
    assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org)", html)


def test_names_of_strangers_are_text(many: Many) -> None:
    result = many(3)
    evil = '</script><script>window.evil = 1</script><img src=x onerror="window.evil = 1">'
    layers = [replace(layer, name=f"{evil}.{n}", kind=evil) for n, layer in enumerate(result.layers)]
    left = [{"name": evil, "type_name": evil, "parameters": 3, "reason": evil}]
    told = replace(result, model=evil, budget=evil, distance=evil, layers=layers, float_layers=left)
    told = replace(told, policy=hq.HybridPolicy({layer.name: hq.LayerBits(layer.weight_bits) for layer in layers}))
    for html in (write_page(told), summary(told)):
        assert evil not in html
        assert "<img" not in html
    assert write_page(told).count("</script>") == 2


def test_a_result_of_an_earlier_version_has_a_page(result: hq.Result) -> None:
    bare = replace(result, sensitivities=[], memory={}, history={}, front=[], seconds={}, versions={}, config={})
    html = write_page(replace(bare, accuracy=None, float_accuracy=None, agreement=None, float_layers=[]))
    assert "What this report does not show" in html
    assert "every layer with parameters is quantized" in html


def test_what_was_chosen_is_called_the_closest_only_where_it_is(result: hq.Result) -> None:
    first = next(iter(result.baselines.values()))
    kinds = {"uniform": 0.02, "dynamic_programming": 0.01, "search": 0.03}
    baselines = {name: replace(first, name=name, kl=kl) for name, kl in kinds.items()}
    html = write_page(replace(result, chosen="search", baselines=baselines))
    assert "what fine-tuning would not repair" in html
    assert "1.5 times as far as the best uniform policy" in html
    html = write_page(replace(result, chosen="dynamic_programming", baselines=baselines))
    assert "it was the closest to the float model before fine-tuning" in html
    assert "2 times as close as the best uniform policy" in html


def test_a_notebook_gets_a_summary(result: hq.Result) -> None:
    html = result._repr_html_()
    assert html.startswith('<div class="hq-report">')
    assert "<script" not in html
    assert "genetic search" in html or "dynamic programming" in html


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("layers", [4, 20, 400])
def test_no_error_no_request_and_nothing_sticks_out(
    page: Page, result: hq.Result, many: Many, tmp_path: Path, layers: int, dark: bool
) -> None:
    shown_result = result if layers == 4 else many(layers)
    for width in WIDTHS:
        shown(page, shown_result, tmp_path, width=width, dark=dark)
        # Opened, tables are as wide as they get.
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert page.overflow() == []
        assert page.console == []
        assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []


@needs_browser
def test_text_is_readable_in_both_schemes(page: Page, result: hq.Result, tmp_path: Path) -> None:
    """Contrast of 4.5 to 1 and more, as WCAG 2.1 AA asks of text, for what is written in the pages' roles."""
    ratio = """(() => {
        const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
        const light = (colour) => {
            canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
            const part = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
                .map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
        };
        const paper = light(getComputedStyle(document.documentElement).backgroundColor);
        const texts = [...document.querySelectorAll('p, td, th, dt, dd, small, a, li, h1, h2, summary')];
        return Math.min(...texts.map((e) => {
            const ink = light(getComputedStyle(e).color);
            return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
        }));
    })()"""
    papers = []
    for dark in (False, True):
        shown(page, result, tmp_path, dark=dark)
        assert page.evaluate(ratio) >= 4.5
        papers.append(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
    assert papers[0] != papers[1]


@needs_browser
@pytest.mark.parametrize("layers", [20, 400])
def test_hover_and_keyboard_say_what_a_layer_is(page: Page, many: Many, tmp_path: Path, layers: int) -> None:
    shown(page, many(layers), tmp_path)
    marks = "#layers [data-tip]"
    assert page.evaluate(f"document.querySelectorAll({json.dumps(marks)}).length") == layers
    page.hover(marks)
    tip = page.evaluate("document.getElementById('tip').innerText")
    assert tip.startswith("model.layers.0.self_attn.q_proj")
    assert all(word in tip for word in ("64 × 64", "300 B", "sensitivity"))
    assert page.evaluate("!document.getElementById('tip').hidden")
    # One stop of the Tab key for the whole chart; the arrows walk inside it.
    assert page.evaluate("document.querySelectorAll('#layers [data-tip][tabindex=\"0\"]').length") == 1
    page.evaluate("document.querySelector('#layers [data-tip][tabindex=\"0\"]').focus()")
    page.press("ArrowRight")
    assert "k_proj" in page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.press("End")
    number = (layers - 1) // 3
    assert f"layers.{number}." in page.evaluate("document.getElementById('tip').innerText")
    page.press("Escape")
    assert page.evaluate("document.getElementById('tip').hidden")


@needs_browser
def test_a_screen_reader_finds_names_for_everything(page: Page, result: hq.Result, tmp_path: Path) -> None:
    shown(page, result, tmp_path)
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate("document.querySelectorAll('h1').length") == 1
    unnamed = """[...document.querySelectorAll('svg, [role=img], [role=meter], [role=region], section, nav, a')]
        .filter((e) => !e.closest('[aria-hidden=true]') && !e.hasAttribute('aria-label')
            && !e.hasAttribute('aria-labelledby') && !e.textContent.trim()).map((e) => e.outerHTML)"""
    assert page.evaluate(unnamed) == []
    broken = """[...document.querySelectorAll('[aria-labelledby]')]
        .filter((e) => !document.getElementById(e.getAttribute('aria-labelledby'))).length"""
    assert page.evaluate(broken) == 0
    page.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"


@needs_browser
def test_the_data_can_be_downloaded(page: Page, result: hq.Result, tmp_path: Path) -> None:
    shown(page, result, tmp_path)
    text = page.evaluate("fetch(document.querySelector('#download a').href).then((r) => r.text())")
    assert json.loads(text)["model"] == "TinyNet"


@needs_browser
def test_the_summary_stands_alone(page: Page, result: hq.Result, tmp_path: Path) -> None:
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><body>{summary(result)}", encoding="utf-8")
    page.open(path.as_uri(), width=768)
    assert page.overflow() == page.console == []
