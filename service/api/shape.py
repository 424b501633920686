"""The JSON of a text route's answer, whole and streamed: order of chunks, ends, usage, times, warnings. The constant parts once.

Where chat and completions differ they bring a `Form`. Nothing here is checked by pydantic on the way out: the contract's tests do that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from service.api.choice import Piece, Token
from service.api.generation import Generation
from service.api.schema import SamplingFields
from service.api.sse import DONE, event
from service.errors import BraidError

Tokens = Sequence[Token]


class Form(Protocol):
    """What a choice looks like. before_text and after_text surround a plain chunk's text, in bytes of JSON. usage_details: what is added
    to the details of the usage."""

    whole_object: str
    chunk_object: str
    before_text: bytes
    after_text: bytes

    @property
    def usage_details(self) -> Mapping[str, int]: ...

    def opening(self, choice: int) -> dict[str, Any] | None:
        """What a choice's stream begins with; None when it begins with its text."""

    def delta(self, text: str | None) -> dict[str, Any]:
        """New text in a chunk; None in the chunk that ends the choice."""

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """A piece's news in as many chunks as it takes; its end is not among them."""

    def message(self, choice: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """All of a choice that is not streamed."""

    def about_prompt(self) -> dict[str, Any]:
        """What the answer tells of the prompt beside the choices: in its first chunk, and where it is whole."""

    def finish(self, reason: str) -> str:
        """The API's word for the end of a choice."""

    def logprobs(self, choice: int, tokens: Tokens) -> dict[str, Any]:
        """Of a choice's next tokens."""


class Shape:
    """One answer. head: id, created, model and system_fingerprint, equal in all chunks."""

    def __init__(self, head: dict[str, Any], generation: Generation, form: Form, request: SamplingFields, warnings: list[str]) -> None:
        options = request.stream_options
        self._head = {**head, "object": form.chunk_object}
        self._generation = generation
        self._form = form
        self._has_logprobs = request.num_logprobs is not None
        self._has_ids = request.return_token_ids
        self._has_usage = options is not None and options.include_usage
        self._is_continuous = self._has_usage and options is not None and options.continuous_usage_stats
        self._is_plain = not (self._has_logprobs or self._has_ids or self._is_continuous)
        self._warnings = warnings
        self._num_open = len(generation.choices)
        self._pieces: list[list[Piece]] = [[] for _ in generation.choices]
        start = b"data: " + msgspec.json.encode(self._head)[:-1]
        self._before = [start + b',"choices":[{"index":%d,' % index + form.before_text for index in range(self._num_open)]
        self._after = (
            form.after_text + b',"logprobs":null,"finish_reason":null}]' + (b',"usage":null}\n\n' if self._has_usage else b"}\n\n")
        )

    def opening(self) -> bytes:
        """Each choice's beginning in rising order; with the first the warnings, and what is told of the prompt."""
        extra = {**({"warnings": self._warnings} if self._warnings else {}), **self._form.about_prompt()}
        firsts = [self._form.opening(index) for index in range(self._num_open)]
        if firsts[0] is None:
            return self._event(0, self._form.delta(""), extra) if extra else b""
        return b"".join(self._event(index, first or {}, {} if index else extra) for index, first in enumerate(firsts))

    def chunk(self, piece: Piece) -> bytes:
        """The events of one piece, its choice's end included; empty when there is nothing to tell."""
        data = b""
        if not self._is_plain or piece.reasoning or piece.calls or piece.images:
            data = self._news(piece)
        elif piece.text:
            data = self._before[piece.choice] + msgspec.json.encode(piece.text) + self._after
        if piece.finish is not None:
            self._num_open -= 1
            is_end = not self._num_open and not self._has_usage
            extra = {"timings": self._generation.timings()} if is_end else {}
            data += self._event(piece.choice, {**self._form.delta(None), **self._ending(piece)}, extra)
        return data

    def _news(self, piece: Piece) -> bytes:
        """The logprobs and ids come with the first of several."""
        contents = self._form.deltas(piece)
        if not contents and (piece.tokens or piece.ids):
            contents = [self._form.delta("")]
        if contents and self._has_ids:
            contents[0] = {**contents[0], "token_ids": piece.ids}
        return b"".join(
            self._event(piece.choice, content, {}, tokens=() if place else piece.tokens) for place, content in enumerate(contents)
        )

    def closing(self) -> bytes:
        """The usage, where it was asked for, and the end mark."""
        if not self._has_usage:
            return DONE
        return event({**self._head, "choices": [], "usage": self._usage(), "timings": self._generation.timings()}) + DONE

    def failure(self, error: BraidError) -> bytes:
        """An error event, which is the last one."""
        return event(error.body())

    def _event(self, index: int, content: dict[str, Any], extra: dict[str, Any], *, tokens: Tokens = ()) -> bytes:
        logprobs = self._form.logprobs(index, tokens) if tokens and self._has_logprobs else None
        choice = {"index": index, "logprobs": logprobs, "finish_reason": None, **content}
        usage = {"usage": self._usage() if self._is_continuous else None} if self._has_usage else {}
        return event({**self._head, "choices": [choice], **usage, **extra})

    def _ending(self, piece: Piece) -> dict[str, Any]:
        reason = {} if piece.stop_reason is None else {"stop_reason": piece.stop_reason}
        return {"finish_reason": self._form.finish(piece.finish or "stop"), **reason}

    def _usage(self) -> dict[str, Any]:
        usage = self._generation.usage()
        if self._form.usage_details:
            details = {**usage["completion_tokens_details"], **self._form.usage_details}  # type: ignore[dict-item]
            return {**usage, "completion_tokens_details": details}
        return usage

    def add(self, piece: Piece) -> None:
        """Keeps a piece for `whole`. Mutates: the shape."""
        self._pieces[piece.choice].append(piece)

    def whole(self) -> bytes:
        """The body of an answer that is not streamed."""
        body = {
            **self._head,
            "object": self._form.whole_object,
            "choices": [self._whole_choice(place, index) for place, index in enumerate(self._generation.kept())],
            "usage": self._usage(),
            "timings": self._generation.timings(),
            **self._form.about_prompt(),
        }
        return msgspec.json.encode({**body, "warnings": self._warnings} if self._warnings else body)

    def _whole_choice(self, place: int, index: int) -> dict[str, Any]:
        """place: among the choices of the answer; index: among those that were drawn."""
        pieces = self._pieces[index]
        tokens = [token for piece in pieces for token in piece.tokens]
        logprobs = self._form.logprobs(index, tokens) if self._has_logprobs else None
        ids = {"token_ids": [token for piece in pieces for token in piece.ids]} if self._has_ids else {}
        return {"index": place, **self._form.message(index, pieces), "logprobs": logprobs, **self._ending(pieces[-1]), **ids}
