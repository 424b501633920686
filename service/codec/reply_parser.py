"""The state machine of every reply: reasoning first, then text in which the model's dialect finds tool calls.

Nothing is lost: what turns out to be no call is text. No form of call is known here: those are in `reply_dialects`. Made by `reply_format`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from service.codec.reply import Parts
from service.codec.reply_calls import CallReader, DoneError
from service.codec.reply_reader import ATTEMPT_READS, NotACallError, Read
from service.codec.tools import ToolSet

_BLANK = " \t\r\n"


class CallForm(Protocol):
    """How a dialect's calls are found and read."""

    @property
    def triggers(self) -> tuple[str, ...]:
        """A call may begin with one of these, anywhere in the text."""

    @property
    def starts(self) -> str:
        """A call may also begin with one of these characters, but only at the very beginning of the text."""

    def read(self, calls: CallReader, trigger: str) -> Read[None]:
        """Reads calls after a trigger, "" when there was none. Raises: NotACallError."""


@dataclass(frozen=True, slots=True)
class Marks:
    """What a model writes around its reasoning."""

    begin: str
    end: str


class Channel:
    """Text on its way out. White space is held back until more comes, because beside a call or a mark it is dropped: between two texts
    what stood before the first call stays."""

    def __init__(self, *, is_fresh: bool) -> None:
        self._pieces: list[str] = []
        self._blanks: list[str] = []
        self._before = ""
        self._is_fresh = is_fresh
        self._is_empty = True

    def add(self, piece: str) -> None:
        body = piece.rstrip(_BLANK)
        if not body:
            self._blanks.append(piece)
            return
        if self._is_fresh:
            bare = body.lstrip(_BLANK)
            blanks = self._before or "".join(self._blanks) + body[: len(body) - len(bare)]
            self._pieces += (bare,) if self._is_empty else (blanks, bare)
        else:
            self._pieces += (*self._blanks, body)
        self._is_fresh = self._is_empty = False
        self._before, self._blanks = "", [piece[len(body) :]]

    def cut(self) -> None:
        """Something else comes now."""
        self._before = self._before or "".join(self._blanks)
        self._blanks = []
        self._is_fresh = True

    def flush(self) -> None:
        """Nothing comes any more."""
        if not self._is_fresh:
            self._pieces += self._blanks
        self._blanks = []

    def take(self) -> str:
        text = "".join(self._pieces)
        self._pieces.clear()
        return text


class DialectParser:
    """Source of the form: service.codec.reply.ReplyParser."""

    def __init__(
        self, marks: Marks | None, form: CallForm | None, tools: ToolSet, make_id: Callable[[], str], *, is_reasoning: bool = False
    ) -> None:
        """form None: what looks like a call is text. is_reasoning: the reply begins inside reasoning."""
        self.is_complete = False
        self._form = form
        self._marks = marks
        self._is_reasoning = is_reasoning and marks is not None
        self._reasoning = Channel(is_fresh=True)
        self._text = Channel(is_fresh=False)
        self._reader = CallReader(tools, make_id, self._text.cut)
        self._steps: Generator[None, None, None] | None = self._run()

    @property
    def has_calls(self) -> bool:
        return self._reader.num_calls > 0

    @property
    def is_cut(self) -> bool:
        return self._reader.num_calls > self._reader.num_whole

    def push(self, text: str) -> Parts:
        if self._steps is None:
            return Parts()
        self._reader.feed(text)
        return self._advance()

    def finish(self) -> Parts:
        self._reader.is_over = True
        return self._advance()

    def _advance(self) -> Parts:
        if self._steps is not None:
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None
        return Parts(self._reasoning.take(), self._text.take(), self._reader.take())

    def _run(self) -> Read[None]:
        try:
            if self._marks is not None:
                yield from self._reason(self._marks)
            yield from self._answer(self._form)
            self._text.flush()
        except DoneError:
            self.is_complete = True

    def _reason(self, marks: Marks) -> Read[None]:
        reader = self._reader
        reader.mark()
        found = ""
        try:
            yield from reader.space()
            found = yield from reader.literal(marks.begin)
        except NotACallError:
            pass
        held = reader.unmark()
        if not found and not self._is_reasoning:
            self._text.add(held)
            return
        if (yield from reader.until(marks.end, emit=self._reasoning.add)):
            self._text.cut()
        else:
            self._reasoning.flush()

    def _answer(self, form: CallForm | None) -> Read[None]:
        reader = self._reader
        if form is None:
            while (yield from reader.peek()):
                self._text.add(reader.text[reader.at :])
                reader.at = len(reader.text)
            return
        if form.starts:
            reader.mark()
            yield from self._attempt(self._start(form))
        while form.triggers and not reader.is_spent:
            trigger = yield from reader.until(*form.triggers, emit=self._text.add)
            if not trigger:
                return
            reader.at -= len(trigger)
            reader.mark()
            reader.at += len(trigger)
            reader.spend(ATTEMPT_READS)
            yield from self._attempt(form.read(reader, trigger))
        yield from self._answer(None)

    def _start(self, form: CallForm) -> Read[None]:
        first = yield from self._reader.space()
        if not first or first not in form.starts:
            raise NotACallError
        yield from form.read(self._reader, "")

    def _attempt(self, steps: Read[None]) -> Read[None]:
        """What turns out not to be a call is text; nothing is lost."""
        with contextlib.suppress(NotACallError):
            yield from steps
        held = self._reader.unmark()
        if held:
            self._text.add(held)
