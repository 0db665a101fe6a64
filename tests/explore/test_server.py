import http.client
import json
import socket
from typing import Any

import pytest

from hq_plugin.errors import ArtifactPathError
from hq_plugin.explore import Server
from hq_plugin.explore.server import FILES, LARGEST

JSON = {"Content-Type": "application/json"}


def ask(
    server: Server, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def test_it_listens_on_loopback_alone(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.socket.family == socket.AF_INET


def test_every_file_of_the_page_is_there_and_may_load_nothing_else(server: Server) -> None:
    for name, (_, _, kind) in FILES.items():
        response, body = ask(server, "GET", f"/{server.token}/{name}")
        assert response.status == 200
        assert body
        assert response.headers["Content-Type"].startswith(kind)
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"https://" not in body


@pytest.mark.parametrize("path", ["/", "/style.css", "/data.json", "/wrong/", "/wrong/data.json", "/%C3%A9/plan"])
def test_without_the_token_there_is_nothing(server: Server, path: str) -> None:
    for method in ("GET", "POST"):
        response, body = ask(server, method, path, b"{}" if method == "POST" else None, JSON)
        assert response.status == 404
        assert body == b"Not Found"


def test_the_token_is_long_and_new_each_time(server: Server) -> None:
    with Server(server.answers) as other:
        assert other.token != server.token
        assert len(other.token) >= 24


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "evil.example:80", ""])
def test_another_host_is_refused(server: Server, host: str) -> None:
    """As a page would send it whose name was bound to this machine after it was loaded."""
    for method in ("GET", "POST"):
        response, _ = ask(server, method, f"/{server.token}/data.json", None, {"Host": host, **JSON})
        assert response.status == 403


def test_it_answers_questions(server: Server) -> None:
    body = json.dumps({"axis": "weight_bits", "limit": 4, "pins": {"head": [3, None]}})
    response, answer = ask(server, "POST", f"/{server.token}/plan", body, JSON)
    assert response.status == 200
    plan = json.loads(answer)
    assert plan["weight_bits"] <= 4
    assert plan["policy"]["head"][0] == 3


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ('{"axis": "weight_bits", "pins": {"tail": [3, null]}}', JSON, 422),
        ('{"axis": "no such"}', JSON, 422),
        ("{}", JSON, 400),
        ("[1]", JSON, 400),
        ("no JSON", JSON, 400),
        ('{"axis": "weight_bits", "limit": "x"}', JSON, 400),
        ('{"axis": "weight_bits", "pins": {"head": 3}}', JSON, 400),
        ('{"axis": "weight_bits", "pins": {"head": [3]}}', JSON, 400),
        ("[" * 100_000, JSON, 400),
        ("{}", {"Content-Type": "text/plain"}, 415),
        ("{}", {**JSON, "Content-Length": str(LARGEST + 1)}, 413),
        ("{}", {**JSON, "Content-Length": "-1"}, 413),
    ],
)
def test_what_is_no_question_is_refused_and_the_server_lives(
    server: Server, body: str, headers: dict[str, str], status: int
) -> None:
    response, _ = ask(server, "POST", f"/{server.token}/plan", body, headers)
    assert response.status == status
    assert ask(server, "GET", f"/{server.token}/data.json")[0].status == 200


def test_a_port_that_is_taken_is_an_error(server: Server) -> None:
    with pytest.raises(ArtifactPathError, match="Port 0 takes a free one"):
        Server(server.answers, server.server_address[1])
