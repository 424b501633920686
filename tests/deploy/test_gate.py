"""The gate before replicas that do as they are told: what is forwarded, and what clients get when a replica fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.deploy.exchange import Forwarded, Head, LostError, Part, Taken
from service.deploy.gate import Gate, Limits
from service.errors import OverloadedError

JSON = Head(200, ((b"content-type", b"application/json"), (b"x-request-id", b"req_1")))
STREAM = Head(200, ((b"content-type", b"text/event-stream; charset=utf-8"),))
Step = Part | Exception | float  # seconds are a pause


class Script:
    """Parts of one answer, as a replica would send them."""

    def __init__(self, steps: list[Step]) -> None:
        self._steps = iter(steps)
        self.is_cancelled = False

    def __aiter__(self) -> AsyncIterator[Part]:
        return self

    async def __anext__(self) -> Part:
        for step in self._steps:
            if isinstance(step, float):
                await asyncio.sleep(step)
            elif isinstance(step, Exception):
                raise step
            else:
                return step
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.is_cancelled = True


class Replicas:
    """A link whose answers stand in a list; the last one is given for ever."""

    def __init__(self, *answers: list[Step]) -> None:
        self._answers = list(answers)
        self.seen: list[Forwarded] = []
        self.given: list[Script] = []

    def send(self, request: Forwarded) -> Script:
        self.seen.append(request)
        steps = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        self.given.append(Script(steps))
        return self.given[-1]


def ask(replicas: Replicas, *, wait_s: float = 5.0, max_body: int = 10_000) -> httpx.AsyncClient:
    gate = Gate(replicas, Limits(wait_s, max_body))

    async def endpoint(request: Request) -> Response:
        return await gate.answer(request)

    app = Starlette(routes=[Route("/{path:path}", endpoint, methods=["GET", "POST", "DELETE", "HEAD"])])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://gate")


def run(
    replicas: Replicas, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, **options: Any
) -> httpx.Response:
    async def go() -> httpx.Response:
        async with ask(replicas, **options) as client:
            return await client.request(method, path, json=body, headers=headers)

    return asyncio.run(go())


def test_requests_and_answers_pass_as_they_are() -> None:
    replicas = Replicas([Taken("r1"), Head(418, ((b"content-type", b"text/plain"), (b"x-own", b"1"))), b"a", b"b"])
    answer = run(replicas, "POST", "/v1/files/a%2Fb?x=%20y", {"k": 1}, {"x-mine": "2", "connection": "x-gone", "x-gone": "3"})
    assert (answer.status_code, answer.content, answer.headers["x-own"]) == (418, b"ab", "1")
    assert answer.headers["x-braid-replica"] == "r1"
    seen = replicas.seen[0]
    assert (seen.method, seen.target, json.loads(seen.body)) == ("POST", "/v1/files/a%2Fb?x=%20y", {"k": 1})
    fields = dict(seen.fields)
    assert fields[b"x-mine"] == b"2"
    assert not fields.keys() & {b"connection", b"x-gone", b"content-length", b"transfer-encoding"}


def test_json_has_its_length() -> None:
    answer = run(Replicas([Taken("r1"), JSON, b'{"a":', b"1}"]), "GET", "/v1/models")
    assert answer.json() == {"a": 1}
    assert answer.headers["content-length"] == "7"


FAILED: list[tuple[str, Callable[[str], Any]]] = [
    ("/v1/chat/completions", lambda last: json.loads(last.removeprefix("data: "))["error"]["code"]),
    ("/v1/completions", lambda last: json.loads(last.removeprefix("data: "))["error"]["code"]),
    ("/v1/messages", lambda last: json.loads(last.removeprefix("event: error\ndata: "))["error"]["code"]),
    ("/v1/responses", lambda last: json.loads(last.removeprefix("event: error\ndata: "))["code"]),
    ("/v1/images/generations", lambda last: json.loads(last.removeprefix("event: error\ndata: "))["error"]["code"]),
]


@pytest.mark.parametrize(("path", "code"), FAILED)
@pytest.mark.parametrize("cut", [b"data: 1\n\n", b"data: 1\n\ndata: {"])
def test_a_stream_whose_replica_dies_ends_with_an_error_event(path: str, code: Callable[[str], Any], cut: bytes) -> None:
    replicas = Replicas([Taken("r1"), STREAM, cut, LostError()])
    answer = run(replicas, "POST", path, {"stream": True})
    *before, last = answer.text.removesuffix("\n\n").split("\n\n")
    assert before[0] == "data: 1"
    assert code(last) == "server_is_overloaded"
    assert len(replicas.seen) == 1


def test_a_stream_that_ends_is_left_alone() -> None:
    replicas = Replicas([Taken("r1"), STREAM, b"data: 1\n\n", b"data: [DONE]\n\n"])
    assert run(replicas, "POST", "/v1/chat/completions", {"stream": True}).text == "data: 1\n\ndata: [DONE]\n\n"


@pytest.mark.parametrize("lost", [[LostError()], [Taken("r1"), LostError()], [Taken("r1"), JSON, b'{"a"', LostError()]])
def test_a_request_goes_to_another_replica_while_nothing_was_sent(lost: list[Step]) -> None:
    replicas = Replicas(lost, [Taken("r2"), JSON, b"{}"])
    answer = run(replicas, "POST", "/v1/chat/completions", {"messages": []})
    assert (answer.status_code, answer.headers["x-braid-replica"], len(replicas.seen)) == (200, "r2", 2)
    assert replicas.given[0].is_cancelled


def test_what_one_replica_is_asked_goes_to_no_other() -> None:
    replicas = Replicas([Taken("r1"), LostError()], [Taken("r2"), JSON, b"{}"])
    answer = run(replicas, "GET", "/metrics", headers={"x-braid-replica": "r1"})
    assert (answer.status_code, [seen.affinity.replica for seen in replicas.seen]) == (503, ["r1"])


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/files", "/v1/batches", "/v1/videos"])
def test_what_leaves_something_behind_is_not_done_twice(path: str) -> None:
    replicas = Replicas([Taken("r1"), LostError()], [Taken("r2"), JSON, b"{}"])
    answer = run(replicas, "POST", path, {})
    assert (answer.status_code, answer.json()["error"]["code"], len(replicas.seen)) == (503, "server_is_overloaded", 1)
    assert answer.headers["retry-after"]


def test_two_losses_are_enough() -> None:
    replicas = Replicas([Taken("r1"), LostError()])
    answer = run(replicas, "POST", "/v1/messages", {})
    assert (answer.status_code, answer.json()["type"], len(replicas.seen)) == (503, "error", 2)


def test_nobody_waits_for_ever_for_a_replica() -> None:
    replicas = Replicas([5.0, Taken("r1"), JSON, b"{}"])
    answer = run(replicas, "GET", "/v1/models", wait_s=0.02)
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "service_unavailable_error")
    assert replicas.given[0].is_cancelled


def test_a_taken_request_may_take_longer_than_the_wait() -> None:
    assert run(Replicas([Taken("r1"), 0.1, JSON, b"{}"]), "GET", "/v1/models", wait_s=0.02).status_code == 200


def test_a_full_queue_is_a_429() -> None:
    answer = run(Replicas([OverloadedError("Too many requests are waiting.", retry_after_s=2.0)]), "POST", "/v1/completions", {})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")


def test_a_large_body_is_refused_before_a_replica_sees_it() -> None:
    replicas = Replicas([Taken("r1"), JSON, b"{}"])
    answer = run(replicas, "POST", "/v1/completions", {"prompt": "x" * 200}, max_body=100)
    assert (answer.status_code, replicas.seen) == (413, [])


def test_a_body_that_was_cut_does_not_look_whole() -> None:
    replicas = Replicas([Taken("r1"), Head(200, ((b"content-type", b"image/png"),)), b"half", LostError()])
    gate = Gate(replicas, Limits())
    sent: list[Any] = []

    async def go() -> None:
        scope = {"type": "http", "method": "GET", "path": "/v1/images/kept/abcdefgh.png", "query_string": b"", "headers": []}

        messages = iter([{"type": "http.request", "body": b"", "more_body": False}])

        async def receive() -> Any:
            return next(messages, None) or await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        await (await gate.answer(Request(scope, receive)))(scope, receive, send)

    with pytest.raises((LostError, ExceptionGroup)) as caught:
        asyncio.run(go())
    assert isinstance(caught.value, LostError) or caught.group_contains(LostError)
    assert all(message.get("more_body", True) for message in sent)


def test_a_stored_response_is_asked_for_where_it_is() -> None:
    stored = "resp_" + "0a" * 16

    async def go(replicas: Replicas) -> None:
        async with ask(replicas) as client:
            await client.post("/v1/responses", json={"input": "x"})
            await client.get(f"/v1/responses/{stored}")
            await client.post("/v1/responses", json={"input": "y", "previous_response_id": stored})
            await client.get("/v1/responses/resp_ffffffffffffffffffff")

    replicas = Replicas([Taken("r7"), JSON, json.dumps({"id": stored}).encode()], [Taken("r7"), JSON, b"{}"])
    asyncio.run(go(replicas))
    assert [seen.affinity.replica for seen in replicas.seen] == ["", "r7", "r7", ""]
