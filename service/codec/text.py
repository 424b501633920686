"""Ids into text as they arrive: whole characters only, and nothing that may yet turn out to begin a stop string.

Does constant work per character, keeps no text but what it holds back, knows no HTTP. Called by the API, one stream per choice.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence

import msgspec

from service.codec.tokenizer import Tokenizer


class TextDelta(msgspec.Struct, frozen=True):
    """text: what may now be shown. num_tokens: how many further tokens are now shown whole (at a stop: those that began before the
    cut), oldest first. stopped: the text ended at stop_string."""

    text: str = ""
    num_tokens: int = 0
    stopped: bool = False
    stop_string: str | None = None


class TextStream:
    """Incremental detokenizer. However the ids are cut into pushes, the deltas joined are the text of all ids up to the stop string
    that is complete first; of several complete at one character, the longest. shown: special ids that are text here."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: StopStrings | Sequence[str] = (),
        include_stop: bool = False,
        *,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._shown = shown
        self._include_stop = include_stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = stop if isinstance(stop, StopStrings) else StopStrings(stop)
        self._stop_node = 0
        self._held = ""  # decoded, not yet shown
        self._num_shown = 0  # characters
        self._spans: deque[tuple[int, int]] = deque()  # of each token not yet shown whole: its first character, one past its last
        self._num_tokens = 0
        self._stop_string: str | None = None
        self._is_over = False

    @property
    def num_tokens_used(self) -> int:
        """Tokens up to and with the one that completed the stop string; all that were pushed if none did."""
        return self._num_tokens

    def push(self, ids: Sequence[int]) -> TextDelta:
        """Takes the next ids; after a stop they are ignored. Mutates: the stream."""
        read, visible = self._tokenizer.token_bytes, self._shown
        if not visible:
            return self._delta([self._take(read(token)) for token in ids])
        return self._delta([self._take(read(token, skip_special=token not in visible)) for token in ids])

    def finish(self) -> TextDelta:
        """Lets go of everything held back, an incomplete character as U+FFFD. Mutates: the stream, which is over."""
        shown = []
        if not self._is_over:
            shown = [self._search(self._decoder.decode(b"", final=True))]
        if not self._is_over:
            shown.append(self._show(len(self._held)))
            self._is_over = True
        return self._delta(shown)

    def _take(self, data: bytes) -> str:
        """One token's bytes; returns what it lets be shown."""
        if self._is_over:
            return ""
        self._num_tokens += 1
        first = self._num_shown + len(self._held)
        text = self._decoder.decode(data)
        has_partial = bool(self._decoder.getstate()[0])
        # An incomplete character will be one character, be it U+FFFD: the tokens that hold its bytes are whole once it is shown.
        self._spans.append((first, first + len(text) + has_partial))
        return self._search(text)

    def _search(self, text: str) -> str:
        for index, char in enumerate(text if self._stops.has_any else ""):
            self._stop_node = self._stops.step(self._stop_node, char)
            stop = self._stops.found(self._stop_node)
            if stop:
                self._held += text[: index + 1]
                self._stop_string = stop
                self._is_over = True
                return self._show(len(self._held) - (0 if self._include_stop else len(stop)))
        self._held += text
        return self._show(len(self._held) - self._stops.depth(self._stop_node))

    def _show(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self._num_shown += len(text)
        return text

    def _delta(self, shown: list[str]) -> TextDelta:
        before = len(self._spans)
        while self._spans and self._is_released(self._spans[0]):
            self._spans.popleft()
        num_tokens = before - len(self._spans)
        if self._is_over:
            self._spans.clear()
        return TextDelta("".join(shown), num_tokens, self._stop_string is not None, self._stop_string)

    def _is_released(self, span: tuple[int, int]) -> bool:
        """Whether a token is shown whole, or at a stop in part; one without text is shown with what precedes it."""
        first, end = span
        return end <= self._num_shown or (self._stop_string is not None and first < self._num_shown)


class StopStrings:
    """Finds any of several strings in texts read one character at a time. A reader keeps the node that it has reached, 0 at first;
    nothing here changes, so that all choices of a request share what may take megabytes.

    Source: Aho and Corasick, Efficient string matching (1975).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self._depth = [0]
        self._found: list[str | None] = [None]
        for stop in stops:
            if stop:
                self._add(stop)
        self._link()

    @property
    def has_any(self) -> bool:
        return len(self._next) > 1

    def step(self, node: int, char: str) -> int:
        """The node after one more character."""
        while node and char not in self._next[node]:
            node = self._fail[node]
        return self._next[node].get(char, 0)

    def found(self, node: int) -> str | None:
        """The longest string that the last character completed, if any."""
        return self._found[node]

    def depth(self, node: int) -> int:
        """How many of the last characters begin one of the strings, which is exactly what has to be held back."""
        return self._depth[node]

    def _add(self, stop: str) -> None:
        node = 0
        for char in stop:
            if char not in self._next[node]:
                self._next[node][char] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self._depth.append(self._depth[node] + 1)
                self._found.append(None)
            node = self._next[node][char]
        self._found[node] = stop

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            for char, child in self._next[node].items():
                fail = self._fail[node]
                while fail and char not in self._next[fail]:
                    fail = self._fail[fail]
                self._fail[child] = self._next[fail].get(char, 0)
                self._found[child] = self._found[child] or self._found[self._fail[child]]
                queue.append(child)
