"""Running sequences read as pieces: all choices of one request, in the order of their arrival, with usage and times.

Shared by the text routes; knows no HTTP and no JSON. `backend` starts a generation; the routes put its pieces on the wire.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

from service.api.choice import Choice, Piece
from service.engine.messages import Event, Generate, Reading
from service.engine.stream import Stream
from service.vocabulary import PictureIds

log = logging.getLogger("braid.requests")


class Generation:
    """All choices of one HTTP request: n for each of its prompts. Read once by `pieces`; ends what still runs when it is left.
    num_kept: how many choices of each prompt are the answer; the best of those that were drawn. readings: of each prompt, once it came.
    show: makes a file of a picture's codes. pictures: which ids are codes, of a model that has some."""

    def __init__(
        self,
        streams: list[Stream[Generate]],
        choices: list[Choice],
        arrival: float,
        num_kept: int | None = None,
        *,
        show: Callable[[tuple[int, ...]], Awaitable[bytes]] | None = None,
        pictures: PictureIds | None = None,
    ) -> None:
        self.choices = choices
        self.num_prompt_tokens = sum(len(stream.request.prompt) for stream in streams)
        self.prompts = [stream.request.prompt for stream in streams]
        self.readings: list[Reading | None] = [None] * len(streams)
        self.num_per_prompt = streams[0].request.num_choices
        self._num_kept = num_kept or self.num_per_prompt
        self._streams = streams
        self._arrival = arrival
        self._show = show
        self._pictures = pictures
        self._late: list[list[Event]] = [[] for _ in streams]

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """Lists of pieces: what one delivery brought, and more when the reader was late. Raises: BraidError."""
        batches = _merged(self._streams)
        try:
            async for index, events in batches:
                first = index * self.num_per_prompt
                if self._streams[index].request.read is not None:
                    events = self._note_reading(index, events)
                pieces = [self.choices[first + event.choice].take(event) for event in events]
                if self._show is not None:
                    for piece in pieces:
                        piece.images = [await self._show(codes) for codes in piece.pictures]
                yield pieces
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
        read = {"cached_tokens": sum(usage.cached_tokens for usage in firsts if usage)}
        written = {"reasoning_tokens": sum(choice.num_reasoning_tokens for choice in self.choices)}
        if self._pictures is not None:
            read["image_tokens"] = sum(1 for prompt in self.prompts for token in prompt if self._pictures.is_code(token))
            written["image_tokens"] = sum(choice.num_image_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.num_prompt_tokens + completion,
            "prompt_tokens_details": read,
            "completion_tokens_details": written,
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


async def _merged(streams: list[Stream[Generate]]) -> AsyncGenerator[tuple[int, list[Event]], None]:
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

    async def feed(index: int, stream: Stream[Generate]) -> None:
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
