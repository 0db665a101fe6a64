"""A real browser for tests: Chromium without a window, driven over its DevTools pipe.

`Page` loads a page at a size and colour scheme, evaluates JavaScript, presses keys and clicks, and remembers what
the console said.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38,
         "ArrowRight": 39, "ArrowDown": 40}  # fmt: skip

needs_browser = pytest.mark.skipif(
    not any(map(shutil.which, NAMES)), reason="needs Chromium: apt-get install chromium, or Google Chrome"
)


class Page:
    """A page of the browser.

    Attributes:
        console: What the page logged as an error or warning, and what was thrown and not caught.
        requests: The addresses that it asked for.
    """

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = send, receive
        self._number, self._buffer = 0, b""
        self._events: list[dict[str, Any]] = []
        self.console: list[str] = []
        self.requests: list[str] = []
        target = self._call("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, None)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable", {})

    def open(self, url: str, *, width: int = 1440, height: int = 900, dark: bool = False) -> None:
        """Loads an address, at a size in pixels and in a colour scheme, and waits until it has loaded."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.console.clear()
        self.requests.clear()
        self._events.clear()
        self._call("Page.navigate", {"url": url})
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression, awaited where it is a promise."""
        answer = self._call(
            "Runtime.evaluate", {"expression": expression, "returnByValue": True, "awaitPromise": True}
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", str(answer)))
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 20) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression} stayed false; console: {self.console}")
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """Presses and releases a key."""
        code = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", {"type": kind, **code})

    def click(self, selector: str) -> None:
        """Clicks the middle of the first element that a selector matches, as a mouse does."""
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            event = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            self._call("Input.dispatchMouseEvent", event)

    def hover(self, selector: str) -> None:
        """Moves the mouse over the middle of the first element that a selector matches."""
        x, y = self.middle(selector)
        self._call("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def drag(self, selector: str, to: tuple[float, float]) -> None:
        """Drags from the middle of an element to a point of the window."""
        x, y = self.middle(selector)
        steps = [(x + (to[0] - x) * n / 5, y + (to[1] - y) * n / 5) for n in range(6)]
        moves = [("mouseMoved", step) for step in steps]
        for kind, (at_x, at_y) in [("mousePressed", steps[0]), *moves, ("mouseReleased", steps[-1])]:
            self._call(
                "Input.dispatchMouseEvent",
                {"type": kind, "x": at_x, "y": at_y, "button": "left", "buttons": 1, "clickCount": 1},
            )

    def download(self, selector: str, path: Path) -> None:
        """Clicks a link that downloads, and waits until the file, named as the link says, is whole."""
        self._call("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(path.parent)}, None)
        self.click(selector)
        end = time.monotonic() + 20
        while not path.exists() or list(path.parent.glob("*.crdownload")):
            if time.monotonic() > end:
                raise TimeoutError(f"{path.name} did not come; there are {[p.name for p in path.parent.iterdir()]}")
            time.sleep(0.02)

    def middle(self, selector: str) -> tuple[float, float]:
        """Scrolls an element into view and returns its middle, in pixels of the window."""
        box = self.evaluate(
            f"""(async () => {{
                const element = document.querySelector({json.dumps(selector)});
                element.scrollIntoView({{block: 'center', inline: 'center', behavior: 'instant'}});
                for (let n = 0; n < 2; n++) await new Promise(requestAnimationFrame);
                const box = element.getBoundingClientRect();
                return [box.left + box.width / 2, box.top + box.height / 2];
            }})()"""
        )
        return box[0], box[1]

    def screenshot(self, path: str | Path, *, whole: bool = True) -> None:
        """Writes a PNG of the whole page, or of the window."""
        data = self._call("Page.captureScreenshot", {"captureBeyondViewport": whole})["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def overflow(self) -> list[str]:
        """Returns what sticks out of the window to the right, and is not inside something that scrolls."""
        found: list[str] = self.evaluate(
            """[...document.querySelectorAll('body *')].filter((e) => {
                 const b = e.getBoundingClientRect();
                 if (b.width === 0 || b.right <= document.documentElement.clientWidth + 0.5) return false;
                 const scrolls = (p) => /auto|scroll|hidden/.test(getComputedStyle(p).overflowX);
                 for (let p = e; p !== document.body; p = p.parentElement) if (scrolls(p)) return false;
                 return true;
               }).map((e) => e.tagName + '.' + (e.className.baseVal ?? e.className) + '#' + e.id)"""
        )
        wide = self.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        return found + (["the page scrolls sideways"] if wide else [])

    def _call(self, method: str, params: dict[str, Any], session: str | None = "") -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._receive, 1 << 20)
            if not part:
                raise RuntimeError("the browser ended")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.console.append(str(details.get("exception", {}).get("description", details["text"])))
        elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.console.append(" ".join(str(arg.get("value", arg.get("description"))) for arg in params["args"]))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.console.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(str(params["request"]["url"]))


@contextmanager
def browser() -> Iterator[Page]:
    """Starts a browser with one page, and ends it."""
    program = next(filter(None, map(shutil.which, NAMES)))
    to_browser, from_browser = os.pipe(), os.pipe()

    def wire() -> None:
        # Chromium reads commands from descriptor 3 and answers on 4; both may be taken by the pipes themselves.
        read, write = os.dup(to_browser[0]), os.dup(from_browser[1])
        spare = [os.dup(read), os.dup(write)]
        while min(spare) <= 4:
            spare = [os.dup(spare[0]), os.dup(spare[1])]
        os.dup2(spare[0], 3)
        os.dup2(spare[1], 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
             "--hide-scrollbars", "--disable-background-networking", f"--user-data-dir={profile}"],
            preexec_fn=wire,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            yield Page(to_browser[1], from_browser[0])
        finally:
            os.close(to_browser[1])  # the end of the pipe is the end of the browser
            os.close(from_browser[0])
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
