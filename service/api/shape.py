"""The JSON of a text route's answer, whole and streamed: order of chunks, ends, usage, times, warnings. The constant parts once.

Where chat and completions differ they bring a `Form`. Nothing here is checked by pydantic on the way out: the contract's tests do that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from service.api.generation import Generation, Piece
from service.api.schema import StreamOptions
from service.api.sse import DONE, event
from service.engine.messages import TokenLogprob
from service.errors import BraidError

Tokens = Sequence[tuple[int, TokenLogprob]]


class Form(Protocol):
    """What a choice looks like. before_text and after_text surround a plain chunk's text, in bytes of JSON."""

    whole_object: str
    chunk_object: str
    before_text: bytes
    after_text: bytes

    def opening(self) -> dict[str, Any] | None:
        """What every choice's stream begins with; None when it begins with its text."""

    def delta(self, text: str | None) -> dict[str, Any]:
        """New text in a chunk; None in the chunk that ends the choice."""

    def message(self, text: str) -> dict[str, Any]:
        """All text of a choice that is not streamed."""

    def logprobs(self, choice: int, tokens: Tokens) -> dict[str, Any]:
        """Of a choice's next tokens."""


class Shape:
    """One answer. head: id, created, model and system_fingerprint, equal in all chunks."""

    def __init__(
        self,
        head: dict[str, Any],
        generation: Generation,
        form: Form,
        *,
        has_logprobs: bool,
        options: StreamOptions | None,
        warnings: list[str],
    ) -> None:
        self._head = {**head, "object": form.chunk_object}
        self._generation = generation
        self._form = form
        self._has_logprobs = has_logprobs
        self._has_usage = options is not None and options.include_usage
        self._is_continuous = self._has_usage and options is not None and options.continuous_usage_stats
        self._warnings = warnings
        self._num_open = len(generation.choices)
        self._pieces: list[list[Piece]] = [[] for _ in generation.choices]
        start = b"data: " + msgspec.json.encode(self._head)[:-1]
        self._before = [start + b',"choices":[{"index":%d,' % index + form.before_text for index in range(self._num_open)]
        self._after = (
            form.after_text + b',"logprobs":null,"finish_reason":null}]' + (b',"usage":null}\n\n' if self._has_usage else b"}\n\n")
        )

    def opening(self) -> bytes:
        """Each choice's beginning in rising order, the warnings with the first."""
        first = self._form.opening()
        if first is None:
            return self._event(0, self._form.delta(""), {"warnings": self._warnings}) if self._warnings else b""
        extra = {"warnings": self._warnings} if self._warnings else {}
        return b"".join(self._event(index, first, {} if index else extra) for index in range(self._num_open))

    def chunk(self, piece: Piece) -> bytes:
        """The events of one piece, its choice's end included; empty when there is nothing to tell."""
        data = b""
        if piece.text or piece.tokens:
            if self._has_logprobs or self._is_continuous:
                data = self._event(piece.choice, self._form.delta(piece.text), {}, tokens=piece.tokens)
            else:
                data = self._before[piece.choice] + msgspec.json.encode(piece.text) + self._after
        if piece.finish is not None:
            self._num_open -= 1
            is_end = not self._num_open and not self._has_usage
            data += self._event(piece.choice, self._form.delta(None), {"timings": self._generation.timings()} if is_end else {}, end=piece)
        return data

    def closing(self) -> bytes:
        """The usage, where it was asked for, and the end mark."""
        if not self._has_usage:
            return DONE
        return event({**self._head, "choices": [], "usage": self._generation.usage(), "timings": self._generation.timings()}) + DONE

    def failure(self, error: BraidError) -> bytes:
        """An error event, which is the last one."""
        return event(error.body())

    def _event(
        self, index: int, content: dict[str, Any], extra: dict[str, Any], *, tokens: Tokens = (), end: Piece | None = None
    ) -> bytes:  # fmt: skip
        choice = {"index": index, **content, "logprobs": self._form.logprobs(index, tokens) if tokens else None, **_ending(end)}
        usage = {"usage": self._generation.usage() if self._is_continuous else None} if self._has_usage else {}
        return event({**self._head, "choices": [choice], **usage, **extra})

    def add(self, piece: Piece) -> None:
        """Keeps a piece for `whole`. Mutates: the shape."""
        self._pieces[piece.choice].append(piece)

    def whole(self) -> bytes:
        """The body of an answer that is not streamed."""
        body = {
            **self._head,
            "object": self._form.whole_object,
            "choices": [self._whole_choice(index, pieces) for index, pieces in enumerate(self._pieces)],
            "usage": self._generation.usage(),
            "timings": self._generation.timings(),
        }
        return msgspec.json.encode({**body, "warnings": self._warnings} if self._warnings else body)

    def _whole_choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        content = self._form.message("".join(piece.text for piece in pieces))
        tokens = [token for piece in pieces for token in piece.tokens]
        logprobs = self._form.logprobs(index, tokens) if self._has_logprobs else None
        return {"index": index, **content, "logprobs": logprobs, **_ending(pieces[-1])}


def _ending(piece: Piece | None) -> dict[str, Any]:
    if piece is None:
        return {"finish_reason": None}
    reason = {} if piece.stop_reason is None else {"stop_reason": piece.stop_reason}
    return {"finish_reason": piece.finish, **reason}
