"""One measured request: sent, streamed, timed. Over a plain socket, because through httpx a token costs the client 0.27 ms, which on a
small machine comes out of the server's time; here it is some 0.01 ms. JSON is parsed when the stream has ended.

Knows the streams of chats, completions and pictures, by whichever server; not what is asked. Used by `run` and bench/.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from service.bench.server import Server, reason_in

_TIMEOUT_S = 3600.0  # of one request; a server that hangs must not hang the measurement
# Something to read or to look at. Empty text is none: the first chunk may carry only the role. Within a text quotes are escaped.
_NEWS = re.compile(rb'"(?:content|text|reasoning_content|reasoning)"\s*:\s*"(?!")|"type"\s*:\s*"image_(?:generation|edit)\.')
_LAST_EVENTS = 4  # usage, finish_reason, an error and [DONE] are among these


@dataclass
class Answer:
    """What one request measured, by the clock of time.perf_counter.

    chunk_times: when each chunk with some text came, or each preview and picture. Chunks that were read together share a time, so their
    gaps are 0, as in vLLM's client. A chunk with several tokens (Braid sends those of one step together) is one entry.
    has_usage: the server counted the tokens; otherwise output_tokens are chunks, and prompt_tokens what was meant to be sent.
    """

    sent: float
    chunk_times: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    has_usage: bool = True
    text: str = ""
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """A model may draw ids that have no text; with nothing else the end is all that is known."""
        return (self.chunk_times[0] if self.chunk_times else self.ended) - self.sent

    @property
    def e2el_s(self) -> float:
        return self.ended - self.sent

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.e2el_s - self.ttft_s) / max(self.output_tokens - 1, 1)

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.chunk_times)]


class _Body:
    """Bytes of an HTTP body as they come: out of its chunks, if it has such, and cut at line ends."""

    def __init__(self, *, is_chunked: bool) -> None:
        self.is_chunked = is_chunked
        self._raw = b""
        self._left = 0  # of the chunk that is being read, with its line end
        self._line: list[bytes] = []
        self.has_ended = False  # known of chunks alone; otherwise the connection ends

    def lines(self, data: bytes) -> bytes:
        """The lines that are whole by now."""
        if self.is_chunked:
            data = self._dechunked(data)
        cut = data.rfind(b"\n") + 1
        if not cut:
            self._line.append(data)
            return b""
        whole = b"".join((*self._line, data[:cut]))
        self._line = [data[cut:]]
        return whole

    def rest(self) -> bytes:
        return b"".join(self._line)

    def _dechunked(self, data: bytes) -> bytes:
        data, pieces = self._raw + data, []
        self._raw = b""
        while data:
            if self._left:
                piece = data[: self._left]
                data = data[len(piece) :]
                # The line end behind a chunk is the last two bytes of what is left of it.
                pieces.append(piece[: max(0, self._left - 2)])
                self._left -= len(piece)
                continue
            size, end, after = data.partition(b"\r\n")
            if not end:
                self._raw = data
                break
            length = int(size.partition(b";")[0], 16)
            if not length:
                self.has_ended = True
                break
            self._left, data = length + 2, after
        return b"".join(pieces)


async def ask(server: Server, route: str, body: dict[str, Any], *, keeps_text: bool = False) -> Answer:
    """One request. Never raises for what the server does: that is the answer's `error`. keeps_text: its text is wanted, not only times."""
    content = json.dumps(body).encode()
    answer = Answer(time.perf_counter())
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await server.open()
            try:
                writer.write(server.head(route, len(content)) + content)
                events = await _read(reader, answer)
            finally:
                writer.close()
        if answer.error is None:
            _finish(answer, events, keeps_text=keeps_text)
    except EOFError:
        answer.error = "the connection ended before an answer"
    except (OSError, ValueError, asyncio.LimitOverrunError) as error:  # TimeoutError is an OSError
        answer.error = str(error) or type(error).__name__
    return answer


async def _read(reader: asyncio.StreamReader, answer: Answer) -> list[bytes]:
    """The data of all events. Mutates: answer's times, or its error when the status is not 200."""
    status = await reader.readline()
    headers = (await reader.readuntil(b"\r\n\r\n")).lower()
    body = _Body(is_chunked=b"transfer-encoding: chunked" in headers)
    if status.split()[1:2] != [b"200"]:
        text = b""
        while not body.has_ended and (data := await reader.read(65_536)):
            text += body.lines(data)
        answer.error = f"{status.decode(errors='replace').strip()}: {reason_in((text + body.rest()).decode(errors='replace'))}"
        return []
    events: list[bytes] = []
    while not body.has_ended and (data := await reader.read(65_536)):
        now = time.perf_counter()
        if lines := body.lines(data):
            answer.ended = now
            answer.chunk_times += [now] * len(_NEWS.findall(lines))
            events += [line[5:] for line in lines.splitlines() if line.startswith(b"data:")]
    if body.is_chunked and not body.has_ended:
        answer.error = "the connection ended before the answer"
    return events


def _finish(answer: Answer, events: list[bytes], *, keeps_text: bool) -> None:
    """Reads usage, errors and, if wanted, the text. Mutates: answer. Raises: ValueError for what is no JSON."""
    has_ended, usage, kind = False, None, ""
    for raw in events[-_LAST_EVENTS:]:
        if raw.strip() == b"[DONE]":
            has_ended = True
            continue
        event = json.loads(raw)
        if not isinstance(event, dict):
            raise ValueError("the stream has events that are no objects")
        if event.get("error"):
            answer.error = reason_in(raw.decode(errors="replace"))
            return
        kind = str(event.get("type", ""))
        has_ended = has_ended or kind.endswith(".completed") or any(choice.get("finish_reason") for choice in event.get("choices") or ())
        usage = event.get("usage") or usage
    if not has_ended:
        answer.error = "the stream ended before its end"
        return
    answer.has_usage = usage is not None
    # Pictures have input_tokens and output_tokens, and their chunks are no tokens.
    usage = usage or {"completion_tokens": 0 if kind.startswith("image_") else len(answer.chunk_times)}
    answer.prompt_tokens = usage.get("prompt_tokens", usage.get("input_tokens")) or 0
    answer.output_tokens = usage.get("completion_tokens", usage.get("output_tokens")) or 0
    answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    if not answer.output_tokens and not answer.chunk_times:
        answer.error = "the stream ended without a token"
    elif keeps_text:
        answer.text = "".join(map(_text_of, events))


def _text_of(raw: bytes) -> str:
    """Of one event; what a model thought is no part of the conversation."""
    if raw.strip() == b"[DONE]":
        return ""
    choices = json.loads(raw).get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    return delta.get("content") or choices[0].get("text") or ""
