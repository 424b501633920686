"""How an answer leaves: whole, or as server-sent events in step with the engine's deliveries. Watches for the client going away.

One send per delivery, no task and no timer per token. Knows no form of JSON: an `Answer` gives the bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.choice import Piece
from service.api.generation import Generation
from service.errors import BraidError, EngineError

log = logging.getLogger("braid.http")
T = TypeVar("T")

KEEP_ALIVE_S = 15.0
_PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def event(data: object, name: str = "") -> bytes:
    """One server-sent event."""
    head = b"event: " + name.encode() + b"\n" if name else b""
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


class Answer(Protocol):
    """The bytes of one answer, in one API's form: opening, chunks, then closing or failure; or add and then whole. `media_type` and the
    names of events are the form's own affair, and so is the last event (such as [DONE])."""

    def opening(self) -> bytes: ...

    def chunk(self, piece: Piece) -> bytes: ...

    def closing(self) -> bytes: ...

    def failure(self, error: BraidError) -> bytes: ...

    def add(self, piece: Piece) -> None: ...

    def whole(self) -> bytes: ...


class Watch:
    """Waits for the client to go away, and then aborts the generation, whose last events still come and are thrown away."""

    def __init__(self, receive: Receive, generation: Generation) -> None:
        self.is_gone = False
        self._task = asyncio.create_task(self._wait(receive, generation))

    async def _wait(self, receive: Receive, generation: Generation) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        generation.abort()

    def stop(self) -> None:
        self._task.cancel()


class WholeAnswer(Response):
    """All choices in one JSON body."""

    def __init__(self, generation: Generation, shape: Answer, headers: Mapping[str, str]) -> None:
        super().__init__()
        self._generation = generation
        self._shape = shape
        self._extra = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = Watch(receive, self._generation)
        try:
            async for pieces in self._generation.pieces():
                for piece in pieces:
                    self._shape.add(piece)
        except BraidError:
            if not watch.is_gone:
                raise
            return
        finally:
            watch.stop()
        if not watch.is_gone:
            await Response(self._shape.whole(), headers=self._extra, media_type="application/json")(scope, receive, send)


class EventStream(Response):
    """Server-sent events. The status waits for the first delivery, so that what fails before it gets a status of its own."""

    def __init__(self, generation: Generation, shape: Answer, headers: Mapping[str, str]) -> None:
        super().__init__(headers={**_HEADERS, **headers}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._generation = generation
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = Watch(receive, self._generation)
        out = _Output(send, self.raw_headers, self._shape.opening())
        try:
            await self._run(out, watch)
        finally:
            watch.stop()
            out.stop()

    async def _run(self, out: _Output, watch: Watch) -> None:
        try:
            async with contextlib.aclosing(self._generation.pieces()) as batches:
                await self._forward(batches, out, watch)
        except BraidError as error:
            if watch.is_gone:
                return
            if not out.is_started:
                raise
            await out.write(self._shape.failure(error), is_last=True)
        except Exception:
            if not out.is_started:
                raise
            log.exception("a stream failed")
            fault = EngineError("The server had an error while it worked on this request.")
            await out.write(self._shape.failure(fault), is_last=True)
        else:
            if not watch.is_gone:
                await out.write(self._shape.closing(), is_last=True)

    async def _forward(self, batches: AsyncGenerator[list[Piece], None], out: _Output, watch: Watch) -> None:
        chunk = self._shape.chunk
        async for pieces in batches:
            if not watch.is_gone:
                data = chunk(pieces[0]) if len(pieces) == 1 else b"".join(map(chunk, pieces))
                if data:
                    await out.write(data)


class ByteStream(Response):
    """Server-sent events that a generator makes. As with `EventStream`, what fails before the first gets a status of its own; a client that
    goes away ends the generator."""

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        super().__init__(headers={**_HEADERS, **headers}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        out = _Output(send, self.raw_headers, b"")
        running = asyncio.create_task(self._run(out))
        try:
            await first_of(running, _gone(receive))
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            out.stop()
        if running.done() and not running.cancelled() and (error := running.exception()) is not None:
            raise error

    async def _run(self, out: _Output) -> None:
        try:
            async with contextlib.aclosing(self._events) as events:
                async for data in events:
                    await out.write(data)
        except BraidError as error:
            if not out.is_started:
                raise
            await out.write(event(error.body(), "error"), is_last=True)
        except Exception:
            if not out.is_started:
                raise
            log.exception("a stream failed")
            fault = EngineError("The server had an error while it worked on this request.")
            await out.write(event(fault.body(), "error"), is_last=True)
        else:
            await out.write(b"", is_last=True)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of work, which is cancelled when the client goes away. Raises: what work raises; ClientDisconnect."""
    running = asyncio.create_task(work)
    try:
        await first_of(running, _gone(request.receive))
        if not running.done():
            raise ClientDisconnect
        return running.result()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def first_of(running: asyncio.Task[Any], other: Coroutine[Any, Any, None]) -> None:
    """Until one of them is done; the other coroutine does not outlive this."""
    waiting = asyncio.create_task(other)
    try:
        await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Output:
    """The ASGI side of one stream: the start once, then whole events, and a comment after a silence so that no proxy gives up."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]], opening: bytes) -> None:
        self.is_started = False
        self._send = send
        self._headers = headers
        self._opening = opening
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._lock = asyncio.Lock()
        self._timer = self._loop.call_later(KEEP_ALIVE_S, self._tick)
        self._ping: asyncio.Task[None] | None = None

    async def write(self, data: bytes, is_last: bool = False) -> None:
        async with self._lock:
            if not self.is_started:
                self.is_started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
                data = self._opening + data
            await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})
        self._last = self._loop.time()

    def _tick(self) -> None:
        """One timer per stream and per silence, whatever the number of tokens."""
        due = self._last + KEEP_ALIVE_S
        now = self._loop.time()
        if now >= due:
            # A write that waits for a slow reader is no silence.
            if not self._lock.locked():
                self._ping = self._loop.create_task(self.write(_PING))
            due = now + KEEP_ALIVE_S
        self._timer = self._loop.call_at(due, self._tick)

    def stop(self) -> None:
        self._timer.cancel()
        if self._ping is not None:
            self._ping.cancel()
