"""Running sequences read as text: the choices of one request, piece by piece, with stop strings, usage and times.

Shared by the text routes; knows no HTTP and no JSON. `backend` starts a generation; chat and completions put its pieces on the wire.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from service.codec.reply import CallDelta
from service.codec.text import TextStream
from service.engine.messages import Event, TokenLogprob, Usage
from service.engine.stream import Stream, error_of
from service.errors import UnavailableError

log = logging.getLogger("braid.requests")


@dataclass(slots=True)
class Piece:
    """What one event brought for one choice: reasoning, then text, then tool calls. tokens: those whose text is now shown whole, kept
    only where logprobs were asked for. ids: the new ids, only where they were asked for. finish: "stop", "length" or "tool_calls" with
    the choice's last piece. stop_reason: the client's stop string or id that ended it."""

    choice: int
    text: str
    tokens: Sequence[tuple[int, TokenLogprob]] = ()
    finish: str | None = None
    stop_reason: str | int | None = None
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()
    ids: Sequence[int] = ()


class Choice:
    """One choice's text as it arrives. own_stops: ids that the client named, which it is told about when one ends the text."""

    def __init__(self, index: int, text: TextStream, own_stops: frozenset[int], abort: Callable[[], None]) -> None:
        self.index = index
        self.usage: Usage | None = None
        self.end = "left"
        self._text = text
        self._own_stops = own_stops
        self._abort = abort
        self._held: deque[tuple[int, TokenLogprob]] = deque()
        self._stop_string: str | None = None

    @property
    def num_tokens(self) -> int:
        """Drawn so far; up to the stop string once there is one."""
        if self.usage is None or self._stop_string is not None:
            return self._text.num_tokens_used
        return self.usage.completion_tokens

    def take(self, event: Event) -> Piece:
        """Raises: the error that the event stands for. Mutates: the choice."""
        piece = Piece(self.index, "")
        if event.tokens and self._stop_string is None:
            self._push(event, piece)
        if event.finish is not None:
            self.usage = event.usage
            self.end = event.finish
            self._finish(event, piece)
        return piece

    def _push(self, event: Event, piece: Piece) -> None:
        delta = self._text.push(event.tokens)
        if event.logprobs is not None:
            self._held.extend(zip(event.tokens, event.logprobs, strict=True))
        piece.text = delta.text
        piece.tokens = self._release(delta.num_tokens)
        if delta.stopped:
            self._stop_string = delta.stop_string or ""
            if event.finish is None:
                self._abort()

    def _finish(self, event: Event, piece: Piece) -> None:
        if self._stop_string is not None:
            self.end = piece.finish = "stop"
            piece.stop_reason = self._stop_string
            return
        if (error := error_of(event)) is not None:
            raise error
        if event.finish == "abort":
            raise UnavailableError("The request was aborted.")
        rest = self._text.finish()
        piece.text += rest.text
        piece.tokens = [*piece.tokens, *self._release(rest.num_tokens)]
        piece.finish = event.finish
        piece.stop_reason = event.stop_id if event.stop_id in self._own_stops else None

    def _release(self, count: int) -> Sequence[tuple[int, TokenLogprob]]:
        return [self._held.popleft() for _ in range(min(count, len(self._held)))] if self._held else ()


class Generation:
    """All choices of one HTTP request: n for each of its prompts. Read once by `pieces`; ends what still runs when it is left."""

    def __init__(self, streams: list[Stream], choices: list[Choice], arrival: float) -> None:
        self.choices = choices
        self.num_prompt_tokens = sum(len(stream.request.prompt) for stream in streams)
        self._streams = streams
        self._arrival = arrival

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """Lists of pieces: what one delivery brought, and more when the reader was late. Raises: BraidError."""
        batches = _merged(self._streams)
        per_stream = self._streams[0].request.num_choices
        try:
            async for index, events in batches:
                first = index * per_stream
                yield [self.choices[first + event.choice].take(event) for event in events]
        finally:
            await batches.aclose()
            self.leave()
            self._log()

    def abort(self) -> None:
        """Ends all choices; their last events still come, as an error."""
        for stream in self._streams:
            stream.abort()

    def leave(self) -> None:
        for stream in self._streams:
            stream.leave()

    def _log(self) -> None:
        if log.isEnabledFor(logging.INFO):
            ends = ",".join(choice.end for choice in self.choices)
            num_tokens = sum(choice.num_tokens for choice in self.choices)
            seconds = time.monotonic() - self._arrival
            name = self._streams[0].request.request_id.rpartition("-")[0]
            log.info("%s: %s after %.3f s, %d prompt tokens, %d new", name, ends, seconds, self.num_prompt_tokens, num_tokens)

    def usage(self) -> dict[str, object]:
        """In OpenAI's shape; may be asked at any time. A prompt counts once, however many choices it has."""
        per_stream = self._streams[0].request.num_choices
        firsts = [choice.usage for choice in self.choices[::per_stream]]
        completion = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.num_prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in firsts if usage)},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }

    def timings(self) -> dict[str, float]:
        """Milliseconds, of the slowest choice; total from arrival until now."""
        usages = [choice.usage for choice in self.choices if choice.usage is not None]
        return {
            "queue_ms": _milliseconds(max((usage.queue_s for usage in usages), default=0.0)),
            "prefill_ms": _milliseconds(max((usage.prefill_s for usage in usages), default=0.0)),
            "decode_ms": _milliseconds(max((usage.decode_s for usage in usages), default=0.0)),
            "total_ms": _milliseconds(time.monotonic() - self._arrival),
        }


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 3)


async def _merged(streams: list[Stream]) -> AsyncGenerator[tuple[int, list[Event]], None]:
    """(index of the stream, its events), as they come."""
    if len(streams) == 1:
        batches = streams[0].batches()
        try:
            async for events in batches:
                yield 0, events
        finally:
            await batches.aclose()
        return
    queue: asyncio.Queue[tuple[int, list[Event] | None]] = asyncio.Queue()

    async def feed(index: int, stream: Stream) -> None:
        try:
            async for events in stream.batches():
                queue.put_nowait((index, events))
        finally:
            queue.put_nowait((index, None))

    tasks = [asyncio.create_task(feed(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            index, batch = await queue.get()
            if batch is None:
                num_open -= 1
            else:
                yield index, batch
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
