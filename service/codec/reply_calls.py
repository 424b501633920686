"""What every dialect's calls have in common: which tools may be called, calls as JSON objects, arguments handed on as they come.

What is being read stays text until its tool and the beginning of its arguments are known (`begin`); from then on it is a call. No dialect's
marks are known here. Called by the parser and by the forms of calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from service.codec.reply import CallDelta
from service.codec.reply_reader import NotACallError, Read, Reader
from service.codec.tools import INPUT_BEGIN, INPUT_END, Tool, ToolSet

# Further calls are text.
MOST_CALLS = 128

_NAME_KEYS = frozenset({"name"})
_ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
_IDLE_KEYS = frozenset({"id", "type"})  # may stand before the name; what follows the arguments is passed over whatever it is called


class DoneError(Exception):
    """The request allows nothing more."""


class CallReader(Reader):
    """A reader that knows which tools may be called, and hands on what it reads of their calls."""

    def __init__(self, tools: ToolSet, make_id: Callable[[], str], on_call: Callable[[], None]) -> None:
        """on_call: told before each call's first delta."""
        super().__init__()
        self.num_calls = 0
        self.num_whole = 0
        self._tools = {tool.name: tool for tool in tools.callable_tools}
        self._is_single = tools.is_single
        self._make_id = make_id
        self._on_call = on_call
        self._tool: Tool | None = None
        self._is_begun = False
        self._news: list[tuple[CallDelta, list[str]]] = []

    def take(self) -> list[CallDelta]:
        for delta, pieces in self._news:
            delta.arguments = "".join(pieces)
        deltas = [delta for delta, _ in self._news]
        self._news = []
        return deltas

    def tool(self, name: str) -> Tool:
        """The tool that is called here; nothing is told yet. Raises: NotACallError when it may not be called."""
        if name not in self._tools or self.num_calls >= MOST_CALLS:
            raise NotACallError
        self._tool, self._is_begun = self._tools[name], False
        return self._tool

    def begin(self) -> None:
        """It is a call: from here on it is no text again."""
        if self._tool is None:
            raise NotACallError
        if not self._is_begun:
            self._is_begun = True
            self.unmark()
            self._on_call()
            self._news.append((CallDelta(self.num_calls, self._make_id(), self._tool.name, kind=self._tool.kind), []))
            self.num_calls += 1

    def hand(self, piece: str) -> None:
        """More of the call's arguments."""
        index = self.num_calls - 1
        if not self._news or self._news[-1][0].index != index:
            kind = self._tool.kind if self._tool else "function"
            self._news.append((CallDelta(index, kind=kind), []))
        self._news[-1][1].append(piece)

    def end_call(self) -> None:
        """The call is whole. Raises: NotACallError when no tool was named."""
        if not self._is_begun:
            self.begin()  # a call without arguments
            self.hand("{}" if self._tool and self._tool.kind == "function" else "")
        self.num_whole += 1
        self._tool, self._is_begun = None, False
        if self._is_single:
            raise DoneError

    def arguments(self) -> Read[None]:
        """Reads and hands on the arguments of the tool: an object, or one inside a string; of a custom tool its input, unwrapped.

        Raises: NotACallError.
        """
        if self._tool is None:
            raise NotACallError
        first = yield from self.space()
        if self._tool.kind == "custom":
            yield from self._input(first)
        elif first == "{":
            self.begin()
            yield from self.value(self.hand)
        elif first == '"':
            self.at += 1
            if (yield from self.space()) != "{":
                raise NotACallError
            self.begin()
            yield from self.string(self.hand)
        elif (yield from self.literal("null")):
            self.begin()
            self.hand("{}")
        else:
            raise NotACallError

    def _input(self, first: str) -> Read[None]:
        """{"input": "..."}, whatever the key is called, a string alone, or raw text between marks where a grammar asks for it."""
        if first == "<":
            yield from self.expect(INPUT_BEGIN)
            self.begin()
            if not (yield from self.until(INPUT_END, emit=self.hand)):
                raise NotACallError
            return
        if is_object := first == "{":
            self.at += 1
            yield from self._key()
        yield from self.expect('"')
        self.begin()
        yield from self.string(self.hand)
        if is_object:
            yield from self.rest_of_object()

    def _early_arguments(self, text: str) -> None:
        """Arguments that stood before the name. Raises: NotACallError."""
        try:
            value = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            raise NotACallError from None
        is_custom = self._tool is not None and self._tool.kind == "custom"
        if is_custom and isinstance(value, dict) and len(value) == 1:
            (value,) = value.values()
        if not isinstance(value, str if is_custom else str | dict):
            raise NotACallError
        self.begin()
        self.hand(value if isinstance(value, str) else text)

    def rest_of_object(self) -> Read[None]:
        """Passes over the members that are left, and the bracket. Raises: NotACallError."""
        while True:
            yield from self.space()
            if (yield from self.literal("}")):
                return
            yield from self.expect(",")
            yield from self._key()
            yield from self.value(_ignore)

    def call_object(self) -> Read[None]:
        """One call as a JSON object with a name and arguments, in either order. Raises: NotACallError."""
        self._tool = None
        early: list[str] = []
        yield from self.space()
        yield from self.expect("{")
        while True:
            key = yield from self._key()
            if key in _NAME_KEYS and self._tool is None:
                self.tool((yield from self.short_string()))
                if early:
                    self._early_arguments("".join(early))
            elif key in _ARGUMENT_KEYS and not early:
                yield from self.value(early.append) if self._tool is None else self.arguments()
            elif key in _IDLE_KEYS:
                yield from self.value(_ignore)
            else:
                raise NotACallError
            if self._is_begun:
                self.end_call()
                yield from self.rest_of_object()
                return
            yield from self.space()
            if (yield from self.literal("}")):
                self.end_call()
                return
            yield from self.expect(",")

    def _key(self) -> Read[str]:
        yield from self.space()
        key = yield from self.short_string()
        yield from self.space()
        yield from self.expect(":")
        yield from self.space()
        return key

    def call_objects(self, *separators: str) -> Read[None]:
        """One call as an object, and further ones, with one of some separators between or only white space."""
        while True:
            yield from self.call_object()
            self.mark()
            try:
                yield from self.space()
                yield from self.literal(*separators)
                is_more = (yield from self.space()) == "{"
            except NotACallError:
                is_more = False
            if not is_more:
                self.rewind()
                return
            # If the next one is no call it is text, and so is what separated it.


def _ignore(piece: str) -> None:
    """Takes what nobody wants."""
