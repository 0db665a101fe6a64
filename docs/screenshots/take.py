"""Takes the screenshots of docs/report.md: `python docs/screenshots/take.py MODEL SESSION`, both saved before.

Needs Chromium, and Pillow to make the files small.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path

from PIL import Image

from hq_plugin.artifact import read_result
from hq_plugin.explore import Answers, Server
from hq_plugin.session_store import read_session_outline

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.browser import browser

HERE = Path(__file__).parent
SIZE = {"width": 1100, "height": 1000}


def main(model: str, session: str) -> None:
    """Writes the report and the page of a session, each light and dark."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(Answers(read_session_outline(session), session)) as server,
        browser() as page,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        report = read_result(model).report(Path(folder) / "report.html")
        for dark in (False, True):
            scheme = "dark" if dark else "light"
            page.open(report.as_uri(), **SIZE, dark=dark)
            page.screenshot(HERE / f"report-{scheme}.png", whole=False)
            page.open(server.url, **SIZE, dark=dark)
            page.wait_for("document.querySelectorAll('#rows .planned').length > 0")
            # An early layer is pinned, so that both curves are seen.
            page.evaluate("document.querySelector('#rows .layer:nth-child(2) .width:last-child input').click()")
            page.wait_for("document.getElementById('count').textContent === '1 pinned'")
            page.screenshot(HERE / f"explore-{scheme}.png", whole=False)
        server.shutdown()
    for path in HERE.glob("*.png"):
        Image.open(path).convert("RGB").quantize(200, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            path, optimize=True
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
