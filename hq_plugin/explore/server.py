"""Serves the page of `hq-plugin explore`, to this machine alone.

Loopback only, and behind a random token in the address, so that neither other machines nor other users, nor web
pages that the browser has open, can ask anything. A request whose Host is not this server's own is refused (DNS
rebinding), and the page may load nothing but its own files (Content-Security-Policy).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from hq_plugin.errors import ArtifactPathError, HQError
from hq_plugin.explore.answers import Answers

#: Files of the page: name in the address, to package, file and type.
FILES = {
    "": ("hq_plugin.explore", "explore.html", "text/html"),
    "style.css": ("hq_plugin.report", "style.css", "text/css"),
    "page.css": ("hq_plugin.report", "page.css", "text/css"),
    "explore.css": ("hq_plugin.explore", "explore.css", "text/css"),
    "explore.js": ("hq_plugin.explore", "explore.js", "text/javascript"),
    "front.js": ("hq_plugin.explore", "front.js", "text/javascript"),
    "layers.js": ("hq_plugin.explore", "layers.js", "text/javascript"),
    "format.js": ("hq_plugin.explore", "format.js", "text/javascript"),
}
#: Bytes of a question at most.
LARGEST = 1 << 20
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class Server(ThreadingHTTPServer):
    """A server of one session.

    Args:
        answers: Answers the page's questions.
        port: Port on loopback; 0 takes a free one.

    Attributes:
        url: Address of the page, token and all.

    Raises:
        ArtifactPathError: The port is taken.
    """

    daemon_threads = True

    def __init__(self, answers: Answers, port: int = 0) -> None:
        self.answers, self.token = answers, secrets.token_urlsafe(18)
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise ArtifactPathError(f"Port {port} cannot be used: {error}. Port 0 takes a free one.") from error

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://127.0.0.1:{self.server_address[1]}/{self.token}/"


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "hq_plugin", ""

    def do_GET(self) -> None:
        """Gives a file of the page, or what it shows first."""
        name = self._name()
        if name is None:
            return
        if name == "data.json":
            self._json(lambda: self.server.answers.data())
        elif name in FILES:
            package, file, kind = FILES[name]
            self._send(HTTPStatus.OK, resources.files(package).joinpath(file).read_bytes(), kind)
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        """Answers a question of the page."""
        name = self._name()
        if name is None:
            return
        if name != "plan":
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        # A form of another page cannot send this type, and what can must be allowed by us first, which nothing is.
        if self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LARGEST:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        body = self.rfile.read(int(length))
        self._json(lambda: self.server.answers.plan(json.loads(body)))

    def _name(self) -> str | None:
        """Returns what is asked for under the token, or None once the request has been refused."""
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            self._refuse(HTTPStatus.FORBIDDEN)
            return None
        token, slash, name = self.path.partition("?")[0].removeprefix("/").partition("/")
        # Compared as bytes, and in constant time: what comes over the wire need not be ASCII.
        if not secrets.compare_digest(token.encode(errors="replace"), self.server.token.encode()) or not slash:
            self._refuse(HTTPStatus.NOT_FOUND)
            return None
        return name

    def _json(self, answer: Callable[[], Any]) -> None:
        try:
            status, value = HTTPStatus.OK, answer()
        except HQError as error:
            status, value = HTTPStatus.UNPROCESSABLE_ENTITY, {"error": str(error)}
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            status, value = HTTPStatus.BAD_REQUEST, {"error": f"not a question of this page: {error!r}"}
        self._send(status, json.dumps(value).encode(), "application/json")

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True  # the body of what is refused was not read
        self._send(status, status.phrase.encode(), "text/plain")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", _POLICY),
            ("Cache-Control", "no-store"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the address holds the token."""
