"""Clients that leave, stall or never finish asking: their work ends at once, others notice nothing, and no connection stays."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from service.api.connection import TimedConnection
from tests.api.conftest import eventually
from tests.api.fakes import Running, Script, running


class Hasty(TimedConnection):
    header_s = 0.3
    write_s = 0.3


@pytest.fixture(scope="module")
def hasty() -> Iterator[Running]:
    with running(connection=Hasty) as server:
        yield server


def ask(server: Running, path: str = "/v1/chat/completions", **more: object) -> socket.socket:
    """A request over a socket of its own, whose answer nobody has read yet."""
    question = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": ["a", "b"]}
    body = json.dumps({**question, **more}).encode()
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    raw.sendall(head.encode() + body)
    return raw


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("has_begun", [False, True])
def test_leaving_ends_the_work(server: Running, path: str, n: int, stream: bool, has_begun: bool) -> None:
    hold = None if has_begun else threading.Event()
    server.engine.script = Script(text="word " * 10_000, waits=0.002, hold=hold)
    num_requests = 1 if "chat" in path else 2
    raw = ask(server, path, n=n, stream=stream, max_tokens=2000)
    eventually(lambda: len(server.engine.requests) == num_requests)
    if has_begun and stream:
        assert raw.recv(2000)
    elif has_begun:
        time.sleep(0.02)
    assert not server.engine.ended
    raw.close()
    start = time.monotonic()
    eventually(server.is_idle)
    assert time.monotonic() - start < 1
    assert [event.finish for event in server.engine.ended] == ["abort"] * n * num_requests
    assert len(server.engine.aborts) == num_requests


def test_neighbours_notice_nothing(server: Running) -> None:
    server.engine.script = Script(text="word " * 40, waits=0.002)
    whole: list[str] = []
    reader = threading.Thread(target=lambda: whole.append(server.chat(stream=True).text))
    reader.start()
    for _ in range(20):
        raw = ask(server, stream=True, n=2)
        raw.recv(10)
        raw.close()
    reader.join()
    pieces = [json.loads(line[6:]) for line in whole[0].split("\n\n") if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == "word " * 40


def test_leaving_while_the_prompt_is_read(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    is_encoding, may_go_on = threading.Event(), threading.Event()

    def slow(self: object, messages: object, **others: object) -> list[int]:
        is_encoding.set()
        may_go_on.wait(5)
        return [97]

    monkeypatch.setattr(type(server.codec), "encode_chat", slow)
    raw = ask(server, messages=[{"role": "user", "content": "x" * 10_000}])
    assert is_encoding.wait(5)
    assert httpx.get(f"{server.url}/live", timeout=1).status_code == 200, "the loop goes on meanwhile"
    raw.close()
    time.sleep(0.05)
    may_go_on.set()
    time.sleep(0.1)
    eventually(server.is_idle)
    assert all(event.finish == "abort" for event in server.engine.ended)


def test_a_reader_that_does_not_read_is_cut(hasty: Running) -> None:
    hasty.engine.choose = lambda request: Script(text="x" * 2000, per_event=1)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", hasty.port))
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True, "n": 100, "max_tokens": 2000}).encode()
    raw.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    eventually(lambda: len(hasty.engine.aborts) == 1, 20)
    eventually(hasty.is_idle, 20)
    eventually(lambda: not hasty.server.server_state.connections)
    raw.close()


@pytest.mark.parametrize(
    "start", [b"", b"GET /live HT", b"GET /live HTTP/1.1\r\nHost: x\r\n", b"GET /live HTTP/1.1\r\nHost: x\r\n\r\nGET /li"]
)
def test_half_a_header_is_cut(hasty: Running, start: bytes) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=5) as raw:
        raw.sendall(start)
        begin = time.monotonic()
        data = b""
        try:
            while part := raw.recv(4096):
                data += part
        except ConnectionResetError:
            pass
        assert 0.2 < time.monotonic() - begin < 3
        assert data.count(b"200 OK") == start.count(b"\r\n\r\n")


def test_drops_of_a_header_do_not_help(hasty: Running) -> None:
    def drip(raw: socket.socket) -> None:
        for _ in range(40):
            raw.sendall(b"G")
            time.sleep(0.05)

    with socket.create_connection(("127.0.0.1", hasty.port), timeout=5) as raw:
        begin = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            drip(raw)
        assert time.monotonic() - begin < 1.5


def test_connections_that_are_used_stay(hasty: Running) -> None:
    hasty.engine.choose = lambda request: Script(text="ab", waits=0.25)
    with httpx.Client(base_url=hasty.url) as client:
        for _ in range(2):
            body = {"messages": [{"role": "user", "content": "hi"}]}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
            time.sleep(0.4)
        assert len(hasty.server.server_state.connections) == 1


@pytest.mark.parametrize("headers", [b"X: " + b"a" * 20_000_000 + b"\r\n", b"".join(b"X%d: a\r\n" % i for i in range(5000))])
def test_huge_headers_are_refused(hasty: Running, headers: bytes) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=5) as raw:
        data = b""
        try:
            raw.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n")
            data = raw.recv(100)
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert b" 200 " not in data
    assert httpx.get(f"{hasty.url}/live").status_code == 200
