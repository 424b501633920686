"""All routes at once: each one that takes a body checks it, in the form of its API; a new route that does not fails here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.jobs.desk import open_desk
from tests.api.fakes import Running, running
from tests.api.test_auth import example, routes

# Routes that take a form instead of JSON; their own tests check what is in it.
FORMS = {"/v1/files"}
# Routes that ask for nothing but a name in their path.
WITHOUT_A_BODY = {"/v1/responses/{response_id}/cancel", "/v1/batches/{batch_id}/cancel"}
# Routes whose errors are in Anthropic's form.
ANTHROPIC = ("/v1/messages",)
LEAKS = ("Traceback", "/usr", "/home", "site-packages", "object at", "pydantic", "0x")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With all that can be switched on."""
    desk = open_desk(tmp_path_factory.mktemp("desk"), max_file_bytes=2**20, max_total_bytes=2**24)
    assert desk is not None
    with running(desk=desk) as server:
        yield server
    desk.lock.release()


def posts(server: Running) -> set[str]:
    return {path for method, path in routes(server) if method == "POST"}


def error_of(answer: httpx.Response, path: str) -> dict[str, Any]:
    """The error, whose form is always that of the path's API."""
    assert answer.headers["content-type"] == "application/json", path
    assert answer.headers["x-request-id"], path
    for leak in LEAKS:
        assert leak not in answer.text, path
    body: dict[str, Any] = answer.json()
    if path.startswith(ANTHROPIC):
        assert set(body) == {"type", "error", "request_id"}
        assert {"type", "message"} <= set(body["error"]) <= {"type", "message", "param", "code"}
    else:
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    assert error["message"]
    return error


def send(server: Running, path: str, content: bytes, media_type: str = "application/json") -> httpx.Response:
    return httpx.post(f"{server.url}{example(path)}", content=content, headers={"content-type": media_type}, timeout=10)


def test_exceptions_are_still_there(server: Running) -> None:
    """A name that no route has any more must not excuse a new one."""
    assert posts(server) >= FORMS | WITHOUT_A_BODY


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"a"', b"5", b"{}x", b"\xff", b"[" * 100_000, b'{"a":' * 300 + b"1" + b"}" * 300, b"[1," * 2**19]
)
def test_what_is_no_json_object_is_refused_everywhere(server: Running, body: bytes) -> None:
    for path in sorted(posts(server) - FORMS - WITHOUT_A_BODY):
        answer = send(server, path, body)
        assert answer.status_code == 400, (path, answer.text)
        assert error_of(answer, path)["type"] == "invalid_request_error"
    assert server.engine.requests == []


def test_what_is_no_json_is_refused_everywhere(server: Running) -> None:
    for path in sorted(posts(server) - WITHOUT_A_BODY):
        for media_type in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16"):
            answer = send(server, path, b"{}", media_type)
            assert answer.status_code == 415, (path, answer.text)
            error_of(answer, path)
        answer = httpx.post(
            f"{server.url}{example(path)}", content=b"{}", headers={"content-type": "application/json", "content-encoding": "gzip"}
        )
        assert answer.status_code == 415, (path, answer.text)
    assert server.engine.requests == []


@pytest.mark.parametrize("value", [5, True, {"a": 1}, [[[]]]])
def test_every_body_is_held_to_a_schema(server: Running, value: Any) -> None:
    """Each field that a route knows is given something odd; an object of nothing but oddities is never accepted."""
    names = (
        "model",
        "messages",
        "input",
        "prompt",
        "tokens",
        "content",
        "query",
        "documents",
        "text_1",
        "text_2",
        "input_file_id",
        "endpoint",
    )
    for path in sorted(posts(server) - FORMS - WITHOUT_A_BODY):
        answer = httpx.post(f"{server.url}{example(path)}", json=dict.fromkeys(names, value), timeout=10)
        assert answer.status_code == 400, (path, answer.text)
        assert error_of(answer, path).get("param"), (path, answer.text)
        assert 400 <= httpx.post(f"{server.url}{example(path)}", json={}, timeout=10).status_code < 500, path
    assert server.engine.requests == []


def test_names_that_nothing_has_are_404(server: Running) -> None:
    for method, path in routes(server):
        if "{" in path and method != "HEAD":
            answer = httpx.request(method, f"{server.url}{example(path)}", timeout=10)
            assert answer.status_code == 404, (method, path, answer.text)
            error_of(answer, path)


def test_nothing_changes_on_get(server: Running) -> None:
    """A page of another site can make a browser send a GET, and with it nothing may be started or undone."""
    for method, path in routes(server):
        if method == "GET":
            httpx.get(f"{server.url}{example(path)}", timeout=10)
    assert (server.engine.requests, server.engine.aborts) == ([], [])
