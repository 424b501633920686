"""A server without a model: counts words, streams words, remembers what it was asked. In a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

OVERHEAD = 7  # tokens of a prompt beside its words


@dataclass
class FakeServer:
    """costs: words that are not one token. fails: numbers of the streamed requests that are refused. Those that stream are `asked`.

    waits_for: nothing is answered until so many were there at once.
    """

    costs: dict[str, int] = field(default_factory=dict)
    fails: frozenset[int] = frozenset()
    has_usage: bool = True
    counts: bool = True
    knows_ignore_eos: bool = True
    breaks_off: bool = False
    is_chunked: bool = True
    waits_for: int = 0
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    routes: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    num_running: int = 0
    most_running: int = 0

    def tokens_of(self, body: dict[str, Any]) -> int:
        texts = [each["content"] for each in body["messages"]] if "messages" in body else [body["prompt"]]
        return OVERHEAD + sum(self.costs.get(word, 1) for text in texts for word in text.split())

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            headers = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:] if line)
            self.keys.add(headers.get("authorization", ""))
            text = await reader.readexactly(int(headers.get("content-length", 0)))
            await self._respond(writer, head.split()[1], json.loads(text or b"{}"))
            await writer.drain()
        writer.close()

    async def _respond(self, writer: asyncio.StreamWriter, route: str, body: dict[str, Any]) -> None:
        if route.endswith("/models"):
            return _whole(writer, 200, {"data": [{"id": "fake"}]})
        if "ignore_eos" in body and not self.knows_ignore_eos:
            return _whole(writer, 422, {"detail": "Unexpected fields in the request: {'ignore_eos'}"})
        usage = {"prompt_tokens": self.tokens_of(body), "completion_tokens": body.get("max_tokens")}
        if not body.get("stream"):
            return _whole(writer, 200, {"choices": [], "usage": usage if self.counts else None})
        self.asked.append(body)
        self.routes.append(route)
        if len(self.asked) - 1 in self.fails:
            return _whole(writer, 500, {"error": {"message": "no luck"}})
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        while self.most_running < self.waits_for:
            await asyncio.sleep(0.001)
        await self._stream(writer, route, body, {**usage, "prompt_tokens_details": {"cached_tokens": 3}})
        self.num_running -= 1
        return None

    async def _stream(self, writer: asyncio.StreamWriter, route: str, body: dict[str, Any], usage: dict[str, Any]) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n")
        writer.write(b"Transfer-Encoding: chunked\r\n\r\n" if self.is_chunked else b"Connection: close\r\n\r\n")
        events: list[Any]
        if route.endswith("generations"):
            kinds = ["partial_image"] * body["partial_images"] + ["completed"]
            events = [{"type": f"image_generation.{kind}", "b64_json": "A" * 90_000} for kind in kinds]
            events[-1]["usage"] = {"input_tokens": 5, "output_tokens": 64}
        else:
            events = [_event(route, word) for word in ["", *(f"w{number} " for number in range(body["max_tokens"]))]]
            events.append({"choices": [{"delta": {}, "finish_reason": "length"}]})
            events += [{"choices": [], "usage": usage}] if self.has_usage else []
        for event in events[: len(events) // 2 if self.breaks_off else None]:
            self._send(writer, b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")
            await asyncio.sleep(0)
        if not self.breaks_off:
            self._send(writer, b"" if route.endswith("generations") else b"data: [DONE]\n\n")
            writer.write(b"0\r\n\r\n" if self.is_chunked else b"")

    def _send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        """Events are cut in the middle, as a proxy may do."""
        for piece in filter(None, (data[: len(data) // 2], data[len(data) // 2 :])):
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" if self.is_chunked else piece)


def _event(route: str, text: str) -> dict[str, Any]:
    choice = {"delta": {"role": "assistant", "content": text}} if "chat" in route else {"text": text}
    return {"choices": [{**choice, "finish_reason": None}]}


def _whole(writer: asyncio.StreamWriter, status: int, body: Any) -> None:
    data = json.dumps(body).encode()
    writer.write(f"HTTP/1.1 {status} Fine\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)


@contextlib.contextmanager
def running(server: FakeServer) -> Iterator[FakeServer]:
    has_begun, end = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        listener = await asyncio.start_server(server.answer, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        loops.append(asyncio.get_running_loop())
        has_begun.set()
        async with listener:
            await end.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    has_begun.wait()
    try:
        yield server
    finally:
        loops[0].call_soon_threadsafe(end.set)
        thread.join()
