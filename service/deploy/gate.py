"""The way in: reads a request, says where it belongs, forwards it, and answers in our own forms where a replica fails.

A request is sent a second time only when nothing of an answer has come and nothing is left behind by doing it twice. Knows replicas by a
`Link`; wrapped by `cluster` for Ray Serve, tests give it replicas of their own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from service.api.errors import error_response
from service.api.messages_error import is_messages_path, messages_error
from service.deploy.affinity import kept_name, made_names, read_affinity
from service.deploy.exchange import REPLICA_FIELD, Forwarded, Head, Link, LostError, Parts, Taken, end_to_end
from service.errors import BodyTooLargeError, BraidError, UnavailableError

log = logging.getLogger("braid.gate")

_NUM_KEPT = 100_000
# What these leave behind is nobody's business but the client's that gets the answer.
_REPEATABLE = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/embeddings", "/v1/rerank", "/v1/classify", "/v1/images/")
_GONE = "The replica that worked on this request is gone."


@dataclass(frozen=True, slots=True)
class Limits:
    """wait_s: for a replica that takes a request, for none may be there yet. max_body: bytes."""

    wait_s: float = 30.0
    max_body: int = 32 * 2**20


class Gate:
    def __init__(self, link: Link, limits: Limits) -> None:
        self._link = link
        self._limits = limits
        self._owners: OrderedDict[str, str] = OrderedDict()  # replicas that keep a response, a video or a picture, by its name

    async def answer(self, request: Request) -> Response:
        try:
            return await self._forward(request)
        except BraidError as error:
            return error_response(error)

    async def _forward(self, request: Request) -> Response:
        body = await self._body(request)
        path = request.url.path
        replica = request.headers.get(REPLICA_FIELD, "") or self._owners.get(kept_name(path, body), "")
        affinity = read_affinity(request.headers, body, replica)
        asked = Forwarded(request.method, _target(request), end_to_end(request.headers.raw), body, affinity)
        try:
            return await self._exchange(path, asked)
        except LostError:
            if asked.only or not _may_repeat(request.method, path):
                raise UnavailableError(_GONE, retry_after_s=1.0) from None
        log.warning("a replica was lost before it answered; %s %s goes to another", request.method, path)
        try:
            return await self._exchange(path, replace(asked, affinity=replace(affinity, replica="")))
        except LostError:
            raise UnavailableError(_GONE, retry_after_s=1.0) from None

    async def _exchange(self, path: str, asked: Forwarded) -> Response:
        """Raises: LostError while nothing of an answer has been sent."""
        parts, replica, head = await self._open(asked)
        kind = next((value for name, value in head.fields if name == b"content-type"), b"")
        if kind.startswith(b"application/json") and asked.method != "HEAD":
            whole = b"".join([data async for data in self._bytes(path, parts, replica)])
            response = Response(whole, head.status)
            length = [(b"content-length", str(len(whole)).encode())]
        else:
            is_stream = kind.startswith(b"text/event-stream")
            response = StreamingResponse((self._events if is_stream else self._bytes)(path, parts, replica), head.status)
            length = []
        response.raw_headers = [*head.fields, *length, (REPLICA_FIELD.encode(), replica.encode())]
        return response

    async def _body(self, request: Request) -> bytes:
        parts, size = list[bytes](), 0
        async for part in request.stream():
            size += len(part)
            if size > self._limits.max_body:
                raise BodyTooLargeError(f"the body has more than {self._limits.max_body} bytes")
            parts.append(part)
        return b"".join(parts)

    async def _open(self, request: Forwarded) -> tuple[Parts, str, Head]:
        """Until the head is there. Raises: LostError, UnavailableError, OverloadedError."""
        parts = self._link.send(request)
        try:
            try:
                taken = await asyncio.wait_for(anext(parts), self._limits.wait_s)
            except TimeoutError:
                raise UnavailableError("No replica could take the request in time.", retry_after_s=2.0) from None
            head = await anext(parts)
            if not isinstance(taken, Taken) or not isinstance(head, Head):
                raise LostError("the parts of an answer are out of order")
        except StopAsyncIteration:
            raise LostError("an answer without a head") from None
        except BaseException:
            parts.cancel()
            raise
        return parts, taken.replica, head

    async def _bytes(self, path: str, parts: Parts, replica: str) -> AsyncIterator[bytes]:
        """The rest of a body. Raises: LostError, which breaks the connection where part of it was sent: it must not look whole."""
        try:
            async for part in parts:
                if isinstance(part, bytes):
                    self._learn(path, part, replica)
                    yield part
        finally:
            parts.cancel()

    async def _events(self, path: str, parts: Parts, replica: str) -> AsyncIterator[bytes]:
        """Server-sent events; where the replica is lost, an error is the last one."""
        ending = b"\n\n"
        try:
            async for part in parts:
                if isinstance(part, bytes):
                    self._learn(path, part, replica)
                    ending = (ending + part)[-2:]
                    yield part
        except LostError:
            log.warning("replica %s was lost in the middle of a stream", replica)
            yield (b"" if ending == b"\n\n" else b"\n\n") + failure_event(path, UnavailableError(_GONE))
        finally:
            parts.cancel()

    def _learn(self, path: str, data: bytes, replica: str) -> None:
        for name in made_names(path, data):
            self._owners[name] = replica
            self._owners.move_to_end(name)
        while len(self._owners) > _NUM_KEPT:
            self._owners.popitem(last=False)


def failure_event(path: str, error: BraidError) -> bytes:
    """The last event of a stream that fails, in the form of the API that was asked."""
    if is_messages_path(path):
        return b"event: error\ndata: " + messages_error(error, "") + b"\n\n"
    if path == "/v1/responses":
        told = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        return b"event: error\ndata: " + msgspec.json.encode(told) + b"\n\n"
    name = b"event: error\n" if path.startswith("/v1/images/") else b""
    return name + b"data: " + msgspec.json.encode(error.body()) + b"\n\n"


def _target(request: Request) -> str:
    """Path and query as they came."""
    path = request.scope.get("raw_path") or request.url.path.encode()
    query = request.scope.get("query_string", b"")
    return (path.partition(b"?")[0] + (b"?" + query if query else b"")).decode("latin-1")


def _may_repeat(method: str, path: str) -> bool:
    return method in ("GET", "HEAD", "OPTIONS") or (method == "POST" and path.startswith(_REPEATABLE))
