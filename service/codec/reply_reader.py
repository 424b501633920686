"""Reading text that arrives in pieces: what is next, literals, names and JSON values, each as a generator that waits for more text.

Every character is looked at a bounded number of times, and what a read takes never depends on where the pieces were cut. No dialect is
known here. Called by the parser of replies and by the dialects.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Generator
from typing import TypeVar

# A call whose name is not known after so many characters is text. It bounds what is held back, and copied with each piece.
MOST_HELD = 1 << 15
MOST_NAME = 256
# How many literals, words and strings are read in one reply, and what an attempt to read a call costs of them beside its own. What comes
# when they are spent is text: an adversary's megabyte of small pieces costs no more than a long answer. 1.2 us each on a Zen 5 core.
MOST_READS = 30_000
ATTEMPT_READS = 20

T = TypeVar("T")
# A read under way: it yields when it needs more text, and returns what it read.
Read = Generator[None, None, T]
Emit = Callable[[str], None]

_SPACE = re.compile(r"[ \t\r\n]*")
_SCALAR = re.compile(r"[A-Za-z0-9+.\-]*")
# A backslash takes what it escapes with it, so that an escaped quotation mark is none.
_EVENT = re.compile(r'\\.|["{}\[\]]', re.DOTALL)
_UNKNOWN_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
# Most values are short, and what lies beyond a value's end is looked at in vain.
_LEAST_BLOCK, _MOST_BLOCK = 64, 4096
# One unit after the other, possessive: an ordinary character, an escape that is whole, a surrogate pair, or a high surrogate of which it
# is certain that no low one follows.
_STRING = re.compile(
    r'(?:[^"\\]'
    r"|\\[^u]"
    r"|\\u(?![dD][89abAB])[0-9a-fA-F]{4}"
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}(?:\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?=[^\\]|\\[^u]|\\u[^dD]|\\u[dD][^c-fC-F]))"
    r")*+",
    re.DOTALL,
)
_BEGUN_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3}|u[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u(?:[dD](?:[c-fC-F][0-9a-fA-F]?)?)?)?)?)?")
_SURROGATE = re.compile("[\ud800-\udfff]")


class NotACallError(Exception):
    """What is being read turned out to be something else, or the reply ended in it."""


class Reader:
    """The text that has arrived and has not been read. `at` is the only place in it that outlives a wait.

    While there is a mark everything from there on is kept, so that it can still become text.
    """

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.is_over = False
        self._mark: int | None = None
        self._num_reads = 0

    def feed(self, text: str) -> None:
        """More text; what was read is forgotten. Mutates: the reader."""
        keep = self.at if self._mark is None else self._mark
        self.text = self.text[keep:] + text
        self.at -= keep
        self._mark = None if self._mark is None else 0

    def mark(self) -> None:
        """From here on nothing is forgotten, and at most MOST_HELD characters are read."""
        self._mark = self.at

    def unmark(self) -> str:
        """What was read since the mark, "" without one, which is taken away."""
        held = "" if self._mark is None else self.text[self._mark : self.at]
        self._mark = None
        return held

    def rewind(self) -> None:
        """Back to the mark, which is taken away: nothing was read."""
        self.at = self.at if self._mark is None else self._mark
        self._mark = None

    @property
    def is_marked(self) -> bool:
        return self._mark is not None

    @property
    def end(self) -> int:
        """One past the last character that may be read now."""
        return len(self.text) if self._mark is None else min(len(self.text), self._mark + MOST_HELD)

    def more(self) -> Read[bool]:
        """Waits for text; False when the reply is over. Raises: NotACallError when too much is held."""
        if self._mark is not None and len(self.text) >= self._mark + MOST_HELD:
            raise NotACallError
        if self.is_over:
            return False
        yield
        return True

    def spend(self, num_reads: int = 1) -> None:
        """Raises: NotACallError when the reply has been read in too many pieces."""
        self._num_reads += num_reads
        if self._num_reads > MOST_READS:
            raise NotACallError

    @property
    def is_spent(self) -> bool:
        return self._num_reads + ATTEMPT_READS > MOST_READS

    def peek(self) -> Read[str]:
        """The next character; "" at the end."""
        while self.at >= self.end:
            if not (yield from self.more()):
                return ""
        return self.text[self.at]

    def space(self) -> Read[str]:
        """Skips JSON's white space; the character after it, "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at, self.end).end()  # type: ignore[union-attr]
            if self.at < self.end:
                return self.text[self.at]
            if not (yield from self.more()):
                return ""

    def literal(self, *texts: str) -> Read[str]:
        """Reads the longest of some texts that comes next; "" when none does."""
        self.spend()
        while True:
            end = self.end
            rest = self.text[self.at : min(end, self.at + max(map(len, texts)))]
            found = max((text for text in texts if rest.startswith(text)), key=len, default="")
            if not any(len(text) > len(rest) and text.startswith(rest) for text in texts) or not (yield from self.more()):
                self.at += len(found)
                return found

    def expect(self, text: str) -> Read[None]:
        """Raises: NotACallError when the text does not come next."""
        if not (yield from self.literal(text)):
            raise NotACallError

    def skip(self, *texts: str) -> Read[str]:
        """Reads white space and one of some texts; "" and nothing read when none comes next. There must be no mark."""
        self.mark()
        found = ""
        try:
            yield from self.space()
            found = yield from self.literal(*texts)
        except NotACallError:
            pass
        if found:
            self.unmark()
        else:
            self.rewind()
        return found

    def word(self, chars: re.Pattern[str]) -> Read[str]:
        """The longest run of a class of characters, whose pattern is one repetition. Raises: NotACallError for more than MOST_NAME."""
        self.spend()
        while True:
            stop = chars.match(self.text, self.at, self.end).end()  # type: ignore[union-attr]
            if stop - self.at > MOST_NAME:
                raise NotACallError
            if stop < self.end or not (yield from self.more()):
                word, self.at = self.text[self.at : stop], stop
                return word

    def until(self, *ends: str, emit: Emit) -> Read[str]:
        """Emits what comes before the first of some texts, and reads that one; "" when the reply ends before."""
        self.spend(2)
        pattern = _any_of(ends)
        while True:
            end = self.end
            found = pattern.search(self.text, self.at, end)
            stop = found.start() if found else begun(self.text, self.at, end, ends)
            # Of two texts that begin at one place the longer may still come.
            if found and begun(self.text, stop, end, ends) == stop and not self.is_over:
                found = None
            if stop > self.at:
                emit(self.text[self.at : stop])
                self.at = stop
            if found:
                self.at = found.end()
                return found[0]
            if not (yield from self.more()):
                emit(self.text[self.at :])
                self.at = len(self.text)
                return ""

    def value(self, emit: Emit) -> Read[None]:
        """Emits the text of a JSON value as it is written. Brackets are matched, their kinds are not.

        Raises: NotACallError when none comes next, or the reply ends in it.
        """
        first = yield from self.peek()
        if first and first in '{["':
            yield from self._nested(emit)
            return
        word = yield from self.word(_SCALAR)
        if not word:
            raise NotACallError
        emit(word)

    def _nested(self, emit: Emit) -> Read[None]:
        state = _Depth()
        while True:
            stop = _walk(self.text, self.at, self.end, state)
            if stop > self.at:
                emit(self.text[self.at : stop])
                self.at = stop
            if state.is_closed:
                return
            if not (yield from self.more()):
                emit(self.text[self.at :])
                self.at = len(self.text)
                raise NotACallError

    def string(self, emit: Emit) -> Read[None]:
        """Reads the rest of a JSON string whose quotation mark has been read, and emits what it means. Raises: NotACallError."""
        self.spend()
        while True:
            end = self.end
            stop = _STRING.match(self.text, self.at, end).end()  # type: ignore[union-attr]
            if stop > self.at:
                emit(_meaning(self.text[self.at : stop]))
                self.at = stop
            if stop < end and self.text[stop] == '"':
                self.at += 1
                return
            if stop < end and not _BEGUN_ESCAPE.fullmatch(self.text, stop, end):
                raise NotACallError
            if not (yield from self.more()):
                self.at = end  # the half of an escape means nothing
                raise NotACallError

    def short_string(self) -> Read[str]:
        """A whole JSON string, quotation marks included. Raises: NotACallError."""
        yield from self.expect('"')
        pieces: list[str] = []
        yield from self.string(pieces.append)
        return "".join(pieces)


@functools.cache
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def begun(text: str, start: int, end: int, words: tuple[str, ...]) -> int:
    """Where in text[start:end] its tail may be the beginning of one of some words; `end` when it can't."""
    for index in range(max(start, end - max(map(len, words)) + 1), end):
        tail = text[index:end]
        if any(len(word) > len(tail) and word.startswith(tail) for word in words):
            return index
    return end


def _walk(text: str, at: int, end: int, state: _Depth) -> int:
    """From `at` to one past the bracket or quotation mark that closes the value, or as far as the text goes. Mutates: state."""
    block = _LEAST_BLOCK
    while at < end:
        stop = min(at + block, end)
        block = min(2 * block, _MOST_BLOCK)
        num_slashes = stop - at - len(text[at:stop].rstrip("\\"))
        stop -= num_slashes % 2  # an escape stays in one block
        if stop == at:
            return at
        closing = state.take(_EVENT.findall(text, at, stop))
        if closing is not None:
            return next(itertools.islice(_EVENT.finditer(text, at, stop), closing, None)).end()
        at = stop
    return at


class _Depth:
    """How deep inside a JSON value a reader is."""

    def __init__(self) -> None:
        self.is_closed = False
        self._depth = 0
        self._is_string = False

    def take(self, events: list[str]) -> int | None:
        """Takes backslashes with what they escape, quotation marks and brackets; the index of the one that closed the value, if any."""
        depth, is_string = self._depth, self._is_string
        for index, event in enumerate(events):
            if is_string:
                if event != '"':
                    continue
                is_string = False
            elif event in "{[":
                depth += 1
                continue
            elif event in "}]":
                depth -= 1
            else:
                is_string = event == '"'
                continue
            if depth <= 0:
                self.is_closed = True
                return index
        self._depth, self._is_string = depth, is_string
        return None


def _meaning(text: str) -> str:
    """What stands inside a JSON string, decoded; half a surrogate pair is U+FFFD, an escape that JSON does not know is what it escapes."""
    if "\\" not in text:
        return text
    try:
        meant = json.loads(f'"{text}"', strict=False)
    except ValueError:
        meant = json.loads(
            '"' + _UNKNOWN_ESCAPE.sub(lambda found: found[0] if found[1] in '"\\/bfnrtu' else found[1], text) + '"', strict=False
        )
    return _SURROGATE.sub("\ufffd", meant)
