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

from service.codec.reply import CallDelta, Parts, ReplyParser
from service.codec.text import TextStream
from service.engine.messages import Event, Reading, TokenLogprob, Usage
from service.engine.stream import Stream, error_of
from service.errors import UnavailableError

log = logging.getLogger("braid.requests")

# An id and what is known of its likelihood: nothing of a prompt's first.
Token = tuple[int, TokenLogprob | None]


@dataclass(slots=True)
class Piece:
    """What one event brought for one choice: reasoning, then text, then tool calls. tokens: those whose text is now shown whole, kept
    only where logprobs were asked for. ids: the new ids, only where they were asked for. finish: "stop", "length" or "tool_calls" with
    the choice's last piece. stop_reason: the client's stop string or id that ended it."""

    choice: int
    text: str
    tokens: Sequence[Token] = ()
    finish: str | None = None
    stop_reason: str | int | None = None
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()
    ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """How the text of every choice is read. parser: makes one for a choice, None for text and nothing else. shown: special ids that it
    has to see. is_reasoning: does the text begin inside reasoning? is_named: was one certain tool asked for, whose call is then an
    ordinary end ("stop")? has_text: where there can only be calls, the cut beginning of one is no text."""

    parser: Callable[[], ReplyParser] | None = None
    shown: frozenset[int] = frozenset()
    is_reasoning: bool = False
    is_named: bool = False
    has_text: bool = True


@dataclass(frozen=True, slots=True)
class Echo:
    """What comes before a choice's own text. ids: those of a prompt whose logprobs come with it, as its `Reading` has them."""

    text: str
    ids: Sequence[int] = ()

    def tokens(self, reading: Reading | None) -> list[Token]:
        if not self.ids or reading is None:
            return []
        return [(self.ids[0], None), *zip(self.ids[1:], reading.logprobs, strict=True)]


class Choice:
    """One choice's text as it arrives. own_stops: ids that the client named, which it is told about when one ends the text. abort: tells
    the engine that the choice is over. has_ids: are the ids wanted?"""

    def __init__(
        self,
        index: int,
        text: TextStream,
        own_stops: frozenset[int],
        abort: Callable[[], None],
        reply: Reply,
        *,
        has_ids: bool = False,
        echo: Echo | None = None,
    ) -> None:
        self.index = index
        self.usage: Usage | None = None
        self.end = "left"
        self.num_reasoning_tokens = 0
        self.reading: Reading | None = None
        self._text = text
        self._own_stops = own_stops
        self._abort = abort
        self._parser = reply.parser() if reply.parser is not None else None
        self._is_reasoning = reply.is_reasoning
        self._is_named = reply.is_named
        self._has_text = reply.has_text
        self._has_ids = has_ids
        self._is_plain = self._parser is None and not has_ids
        self._echo = echo
        self._held: deque[Token] = deque()
        self._stop_string: str | None = None
        self._is_cut = False  # by a stop string, or because all that is allowed has been said
        self._logprob = 0.0
        self._num_logprobs = 0

    @property
    def num_tokens(self) -> int:
        """Drawn so far; up to the place where the text was cut, once there is one."""
        if self.usage is None or self._is_cut:
            return self._text.num_tokens_used
        return self.usage.completion_tokens

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, where logprobs were asked for; minus infinity for no token."""
        return self._logprob / self._num_logprobs if self._num_logprobs else float("-inf")

    @property
    def waits_for_reading(self) -> bool:
        """Does it begin with the logprobs of a prompt that are not there yet?"""
        return self._echo is not None and bool(self._echo.ids) and self.reading is None

    def take(self, event: Event) -> Piece:
        """Raises: the error that the event stands for. Mutates: the choice."""
        piece = Piece(self.index, "")
        if self._echo is not None:
            piece.text, piece.tokens = self._echo.text, self._echo.tokens(self.reading)
            self._echo = None
        if event.tokens and not self._is_cut:
            self._push(event, piece)
        if event.finish is not None:
            self.usage = event.usage
            self.end = event.finish
            self._finish(event, piece)
        return piece

    def _push(self, event: Event, piece: Piece) -> None:
        if self._is_plain and event.logprobs is None:  # most of what is ever served
            delta = self._text.push(event.tokens)
            piece.text += delta.text
            if delta.stopped:
                self._stop(delta.stop_string, event)
            return
        before = self._text.num_tokens_used
        if event.logprobs is not None:
            self._held.extend(zip(event.tokens, event.logprobs, strict=True))
        if self._parser is None:
            self._show(event.tokens, piece)
        else:
            # One by one, so that what ends the choice ends it at the same token however many came together.
            for token in event.tokens:
                self._show((token,), piece)
                self.num_reasoning_tokens += self._is_reasoning
                if self._is_cut:
                    break
        num_used = self._text.num_tokens_used - before
        if event.logprobs is not None:
            self._logprob += sum(drawn.logprob for drawn in event.logprobs[:num_used])
            self._num_logprobs += num_used
        if self._has_ids:
            piece.ids = event.tokens[:num_used]
        if self._is_cut:
            self._stop(self._stop_string, event)

    def _stop(self, stop_string: str | None, event: Event) -> None:
        """Nothing more is wanted. Mutates: the choice."""
        self._stop_string = stop_string
        self._is_cut = True
        if event.finish is None:
            self._abort()

    def _show(self, ids: Sequence[int], piece: Piece) -> None:
        delta = self._text.push(ids)
        self._add(delta.text, delta.num_tokens, piece)
        if delta.stopped:
            self._stop_string = delta.stop_string
            self._is_cut = True
        elif self._parser is not None and self._parser.is_complete:
            self._is_cut = True

    def _add(self, text: str, num_tokens: int, piece: Piece) -> None:
        if self._parser is None:
            piece.text += text
        elif text:
            self._sort(self._parser.push(text), piece)
        if num_tokens and self._held:
            piece.tokens = [*piece.tokens, *(self._held.popleft() for _ in range(min(num_tokens, len(self._held))))]

    def _sort(self, parts: Parts, piece: Piece) -> None:
        if parts.text or parts.calls:
            self._is_reasoning = False
        elif parts.reasoning:
            self._is_reasoning = True
        piece.reasoning += parts.reasoning
        piece.text += parts.text
        if parts.calls:
            piece.calls = [*piece.calls, *parts.calls]

    def _finish(self, event: Event, piece: Piece) -> None:
        if not self._is_cut:
            if (error := error_of(event)) is not None:
                raise error
            if event.finish == "abort":
                raise UnavailableError("The request was aborted.")
            last = self._text.finish()
            self._add(last.text, last.num_tokens, piece)
            piece.stop_reason = event.stop_id if event.stop_id in self._own_stops else None
        if self._parser is not None:
            rest = self._parser.finish()
            if not self._has_text:
                rest.text = ""
            self._sort(rest, piece)
        if self._is_cut:
            self.end = "stop"
            piece.stop_reason = self._stop_string
        piece.finish = "tool_calls" if self.end == "stop" and self._ends_with_calls() else self.end

    def _ends_with_calls(self) -> bool:
        """OpenAI's word for such an end, unless the call is just what was asked for. A call that was cut short is no end."""
        parser = self._parser
        return parser is not None and parser.has_calls and not parser.is_cut and not self._is_named


class Generation:
    """All choices of one HTTP request: n for each of its prompts. Read once by `pieces`; ends what still runs when it is left.
    num_kept: how many choices of each prompt are the answer; the best of those that were drawn. readings: of each prompt, once it came."""

    def __init__(self, streams: list[Stream], choices: list[Choice], arrival: float, num_kept: int | None = None) -> None:
        self.choices = choices
        self.num_prompt_tokens = sum(len(stream.request.prompt) for stream in streams)
        self.prompts = [stream.request.prompt for stream in streams]
        self.readings: list[Reading | None] = [None] * len(streams)
        self.num_per_prompt = streams[0].request.num_choices
        self._num_kept = num_kept or self.num_per_prompt
        self._streams = streams
        self._arrival = arrival
        self._late: list[list[Event]] = [[] for _ in streams]

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """Lists of pieces: what one delivery brought, and more when the reader was late. Raises: BraidError."""
        batches = _merged(self._streams)
        try:
            async for index, events in batches:
                first = index * self.num_per_prompt
                if self._streams[index].request.read is not None:
                    events = self._note_reading(index, events)
                yield [self.choices[first + event.choice].take(event) for event in events]
        finally:
            await batches.aclose()
            self.leave()
            self._log()

    def _note_reading(self, index: int, events: list[Event]) -> list[Event]:
        """Keeps what was read of a prompt, and back what comes before it where every choice begins with that. Mutates: the choices."""
        first = index * self.num_per_prompt
        own = self.choices[first : first + self.num_per_prompt]
        for event in events:
            if event.reading is not None:
                self.readings[index] = event.reading
                for choice in own:
                    choice.reading = event.reading
        if own[0].waits_for_reading and not any(event.choice == 0 and event.finish for event in events):
            self._late[index] += events
            return []
        late, self._late[index] = self._late[index], []
        return [*late, *events]

    def kept(self) -> list[int]:
        """The indexes of the choices that are the answer, in its order; to be asked at the end."""
        indexes = list(range(len(self.choices)))
        if self._num_kept == self.num_per_prompt:
            return indexes
        rows = [indexes[start : start + self.num_per_prompt] for start in range(0, len(indexes), self.num_per_prompt)]
        ranked = [sorted(row, key=lambda index: -self.choices[index].mean_logprob) for row in rows]
        return [index for row in ranked for index in row[: self._num_kept]]

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
        firsts = [choice.usage for choice in self.choices[:: self.num_per_prompt]]
        completion = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.num_prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in firsts if usage)},
            "completion_tokens_details": {"reasoning_tokens": sum(choice.num_reasoning_tokens for choice in self.choices)},
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
