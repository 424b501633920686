"""A model's reply taken apart: reasoning, text and tool calls, one state machine for streamed and whole answers.

The contract alone: `reply_format` makes parsers. They work on text whose characters are complete and whose stop strings are found, and
know no HTTP. Used by the API, one parser per choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(slots=True)
class CallDelta:
    """News of one tool call. index counts the calls of a reply from 0; one call is finished before the next begins. id and name come
    once, with the first delta. arguments: the next piece of the JSON text, or of a custom tool's input; may be empty."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    kind: Literal["function", "custom"] = "function"


@dataclass(slots=True)
class Parts:
    """What a piece of reply turned out to be, in this order."""

    reasoning: str = ""
    text: str = ""
    calls: Sequence[CallDelta] = ()


class ReplyParser(Protocol):
    """However a reply is cut into pushes, the joined parts are the same. is_complete: all that the request allows has been said (its only
    call), so the choice can end; what is pushed then is ignored. is_cut: after `finish`, some call is not whole."""

    @property
    def has_calls(self) -> bool: ...

    @property
    def is_complete(self) -> bool: ...

    @property
    def is_cut(self) -> bool: ...

    def push(self, text: str) -> Parts:
        """Takes more of the reply. Mutates: the parser."""

    def finish(self) -> Parts:
        """Lets go of what was held back: a call that was cut short stays as far as it came. Mutates: the parser, which is over."""


class PlainText:
    """A reply that is text and nothing else."""

    has_calls = False
    is_complete = False
    is_cut = False

    def push(self, text: str) -> Parts:
        return Parts(text=text)

    def finish(self) -> Parts:
        return Parts()
