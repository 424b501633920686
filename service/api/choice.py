"""One choice as it arrives: ids into text, stop strings, reasoning and calls told apart, until the word for its end.

Knows no HTTP, no JSON and no engine but its events. `generation` feeds it; the forms of answers read its pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from service.codec.reply import CallDelta, Parts, ReplyParser
from service.codec.text import TextStream
from service.engine.messages import Event, Reading, TokenLogprob, Usage
from service.engine.stream import error_of
from service.errors import UnavailableError
from service.vocabulary import PictureIds

# An id and what is known of its likelihood: nothing of a prompt's first.
Token = tuple[int, TokenLogprob | None]


class Piece(msgspec.Struct):  # made for every token: a dataclass takes four times as long
    """What one event brought for one choice: reasoning, then text, then tool calls. tokens: those whose text is now shown whole, kept
    only where logprobs were asked for. ids: the new ids, only where they were asked for. finish: "stop", "length" or "tool_calls" with
    the choice's last piece. stop_reason: the client's stop string or id that ended it. pictures: codes of those that became whole; images:
    their files."""

    choice: int
    text: str
    tokens: Sequence[Token] = ()
    finish: str | None = None
    stop_reason: str | int | None = None
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()
    ids: Sequence[int] = ()
    pictures: Sequence[tuple[int, ...]] = ()
    images: Sequence[bytes] = ()


class PictureReader:
    """Finds the pictures among a choice's ids."""

    def __init__(self, marks: PictureIds) -> None:
        self.num_codes = 0
        self._marks = marks
        self._codes: list[int] = []

    def push(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        """The pictures that these ids complete. Mutates: the reader."""
        found = []
        for token in ids:
            if self._marks.is_code(token):
                self.num_codes += 1
                self._codes.append(token)
                if len(self._codes) == self._marks.num_places:
                    found.append(tuple(self._codes))
                    self._codes = []
        return found


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
        pictures: PictureReader | None = None,
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
        self._is_plain = self._parser is None and not has_ids and pictures is None
        self._pictures = pictures
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
    def num_image_tokens(self) -> int:
        """Codes that were drawn, where the answer may have pictures."""
        return self._pictures.num_codes if self._pictures is not None else 0

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
        if self._pictures is not None:
            piece.pictures = self._pictures.push(event.tokens)
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
        piece.finish = self._finish_word()

    def _finish_word(self) -> str:
        """OpenAI's word for the end. A call is one of its own unless it is just what was asked for. Where a model leaves a call in the
        middle the answer is not whole, for which there is one word; only the client's own stop string may end it there."""
        parser = self._parser
        if self.end != "stop" or parser is None or not parser.has_calls:
            return self.end
        if parser.is_cut:
            return "stop" if self._stop_string is not None else "length"
        return "stop" if self._is_named else "tool_calls"
