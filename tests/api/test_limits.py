"""How much of everything a client may send: headers, bodies, structure, time; how a connection ends beyond that; and strict servers."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.api.app import Limits
from service.api.body import BodyLimits, BodyRoom, checked
from service.api.connection import TimedConnection
from service.api.envelope import MAX_HEADERS
from service.api.json_bounds import MAX_CONTAINERS, MAX_DEPTH, MAX_KEYS, MAX_VALUES
from service.api.schema import MAX_FIELDS
from service.api.schema_chat import ChatRequest
from service.api.strict import MAX_WARNINGS, Warnings
from service.errors import RequestError
from tests.api.conftest import eventually
from tests.api.fakes import MODEL, Running, running
from tests.api.test_validation import CHAT, HI, check, send

GET = b"GET /live HTTP/1.1\r\nHost: x\r\n"


class Hasty(TimedConnection):
    header_s = 0.3
    linger_s = 0.3


@pytest.fixture(scope="module")
def hasty() -> Iterator[Running]:
    with running(connection=Hasty, limits=Limits(BodyLimits(idle_s=0.3)), api_keys=["some-secret-key"]) as server:
        yield server


def talk(server: Running, *pieces: bytes) -> bytes:
    """All that comes back until the server closes."""
    data = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=8) as raw:
        try:
            for piece in pieces:
                raw.sendall(piece)
            while part := raw.recv(65_536):
                data += part
        except (ConnectionResetError, BrokenPipeError):
            pass
    return data


def error_in(data: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(data.rpartition(b"\r\n\r\n")[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("headers", [b"X: %s\r\n" % (b"a" * 40_000), b"".join(b"X%d: %s\r\n" % (i, b"a" * 400) for i in range(100))])
def test_a_header_that_is_too_large_is_431(hasty: Running, headers: bytes) -> None:
    """Whole, in one piece, which the parser lets pass; and never whole, which it does not."""
    data = talk(hasty, GET + headers + b"Connection: close\r\n\r\n")
    assert data.startswith(b"HTTP/1.1 431 ")
    assert error_in(data)["type"] == "invalid_request_error"
    assert b" 200 " not in talk(hasty, GET, *[headers] * 20)


def test_fields_of_a_header_are_counted(hasty: Running) -> None:
    fields = [b"X%d: a\r\n" % i for i in range(MAX_HEADERS)]
    assert talk(hasty, GET + b"".join(fields[:-2]) + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert talk(hasty, GET + b"".join(fields) + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    "junk", [b"\x16\x03\x01\x02\x00\x01\x00\x01", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nA B: c\r\n\r\n", b"\0" * 100 + b"\r\n\r\n"]
)
def test_junk_is_answered_and_cut(hasty: Running, junk: bytes) -> None:
    begin = time.monotonic()
    for start in (b"", GET + b"\r\n"):
        data = talk(hasty, start + junk)
        assert data.count(b"200 OK") == bool(start)
        assert error_in(data)["type"] == "invalid_request_error"
    assert time.monotonic() - begin < 3


def test_a_body_with_two_lengths_is_refused_and_nothing_behind_it_is_read(hasty: Running) -> None:
    lengths = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = talk(hasty, HEAD + KEY + lengths + b"0\r\n\r\n" + GET + b"\r\n")
    assert data.startswith(b"HTTP/1.1 400 ")
    assert "not both" in error_in(data)["message"]
    assert data.count(b"HTTP/1.1") == 1


def test_half_a_header_is_told_so(hasty: Running) -> None:
    data = talk(hasty, b"GET /live HTTP/1.1\r\nHo")
    assert data.startswith(b"HTTP/1.1 408 ")
    assert error_in(data)["code"] == "request_timeout"
    assert talk(hasty, b"") == b""


KEY = b"Authorization: Bearer some-secret-key\r\n"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "length", [b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", b"Transfer-Encoding: chunked\r\n\r\n"]
)
def test_half_a_body_is_told_so(hasty: Running, length: bytes) -> None:
    data = talk(hasty, HEAD + KEY + length)
    assert data.startswith(b"HTTP/1.1 408 ")
    assert error_in(data)["code"] == "request_timeout"


def test_a_body_that_nobody_waits_for_is_cut(hasty: Running) -> None:
    """Refused for want of a key, or on a route without bodies: the rest is thrown away for a while, and drops of it do not help."""
    for start, status in ((HEAD, b"401"), (GET, b"200")):
        with socket.create_connection(("127.0.0.1", hasty.port), timeout=5) as raw:
            raw.sendall(start + b"Content-Length: 1000000\r\n\r\n")
            assert raw.recv(65_536).split()[1] == status
            begin = time.monotonic()
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                while time.monotonic() - begin < 3:
                    raw.sendall(b"x")
                    time.sleep(0.02)
            assert time.monotonic() - begin < 2
    eventually(lambda: not hasty.server.server_state.connections)


def test_upgrades_are_ignored_quietly(hasty: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="uvicorn.error"):
        answer = httpx.get(f"{hasty.url}/live", headers={"connection": "upgrade", "upgrade": "websocket"})
    assert answer.status_code == 200
    assert "upgrade" not in caplog.text.lower()


def test_structure_is_bounded_before_it_is_built(server: Running) -> None:
    begin = time.monotonic()
    for body in (
        b'{"prompt":[' + b"[]," * MAX_CONTAINERS + b"[1]]}",
        b'{"prompt":[' + b"1," * (MAX_VALUES + 1) + b"1]}",
        b'{"x":{' + b'"a":{},' * MAX_CONTAINERS + b'"b":1}}',
        b'{"x":{' + b'"a" : 1,' * MAX_KEYS + b'"b":1}}',
    ):
        assert check(send(server, body, "/v1/completions"))["code"] == "too_many_values"
    assert time.monotonic() - begin < 2
    nested = b'{"metadata":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}"
    assert "nested" in check(send(server, nested))["message"]
    assert server.engine.requests == []
    brackets = json.dumps({"messages": [{"role": "user", "content": "[" * (MAX_DEPTH + 1)}]}).encode()
    assert send(server, brackets).status_code == 200, "inside of a string they are text"


@pytest.mark.parametrize(("start", "end", "param"), [(b"{", b"}", None), (b'{"messages":[{', b"}]}", "messages[0]")])
def test_a_flood_of_unknown_fields_is_refused_soon(server: Running, start: bytes, end: bytes, param: str | None) -> None:
    fields = b",".join(b'"field %d":1' % index for index in range(MAX_KEYS // 2))
    begin = time.monotonic()
    error = check(send(server, start + fields + end))
    assert time.monotonic() - begin < 1
    assert (error["param"], f"at most {MAX_FIELDS} fields" in error["message"]) == (param, True)


def test_of_many_unknown_fields_only_some_are_told(server: Running) -> None:
    fields = b",".join(b'"field %d":1' % index for index in range(MAX_FIELDS - 1))
    answer = send(server, b'{"messages":[{"role":"user","content":"a"}],' + fields + b"}")
    assert (answer.status_code, len(answer.json()["warnings"])) == (200, MAX_WARNINGS)


def test_bodies_share_their_room() -> None:
    room = BodyRoom(100)
    with running(limits=Limits(BodyLimits(max_bytes=1000, room=room))) as server:
        go_on = threading.Event()

        def slow() -> Iterator[bytes]:
            yield b" " * 80
            go_on.wait(5)
            yield json.dumps({"messages": HI}).encode()

        answers: list[int] = []
        headers = {"content-type": "application/json"}
        reader = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{server.url}{CHAT}", content=slow(), headers=headers, timeout=10).status_code)
        )
        reader.start()
        eventually(lambda: room.num_bytes == 80)
        refused = server.chat("x" * 50)
        assert check(refused, 429)["type"] == "rate_limit_error"
        assert refused.headers["retry-after"] == "1"
        go_on.set()
        reader.join()
        assert answers == [200]
        assert server.chat("x" * 500).status_code == 200, "alone, what is larger than the room gets in"
        assert room.num_bytes == 0


def test_strict_servers_refuse_what_others_warn_about(server: Running) -> None:
    with running(limits=Limits(BodyLimits(is_strict=True))) as strict:
        for path, question in ((CHAT, {"messages": HI}), ("/v1/completions", {"prompt": "a"})):
            lax = server.post(path, **question, temprature=1)
            assert lax.json()["warnings"] == ["unknown field 'temprature' was ignored"]
            assert lax.headers["x-braid-warnings"] == lax.json()["warnings"][0]
            error = check(strict.post(path, **question, temprature=1))
            assert (error["param"], error["code"]) == ("temprature", "strict_mode")
            assert strict.post(path, **question, temperature=1, model=MODEL).status_code == 200
        assert len(strict.engine.requests) == 2


def test_one_mechanism_for_all_warnings() -> None:
    warnings = Warnings()
    for number in range(MAX_WARNINGS + 5):
        warnings.note("a", str(number))
    assert warnings == [str(number) for number in range(MAX_WARNINGS)]
    with pytest.raises(RequestError) as refused:
        Warnings(is_strict=True).note("input[3]", "it was cut")
    assert (refused.value.param, refused.value.code) == ("input[3]", "strict_mode")
    data = {"messages": HI, **{f"no_{number}": 1 for number in range(100)}}
    assert len(checked(data, ChatRequest)[1]) == MAX_WARNINGS
    with pytest.raises(RequestError):
        checked(data, ChatRequest, is_strict=True)
