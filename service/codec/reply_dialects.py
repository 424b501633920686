"""The dialects of tool calls: one entry each in DIALECTS, with the signs by which it is known, how its calls are written and how read.

A new dialect is a new entry, with a function of its own in `reply_forms` only if none there reads it. Called by `reply_format` and the
grammars.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass, replace

from service.codec.reply_calls import CallReader
from service.codec.reply_forms import (
    DS_CALL,
    DS_CALL_END,
    DS_CALLS,
    DS_CALLS_END,
    DS_SEPARATOR,
    read_bare,
    read_deepseek,
    read_function_gemma,
    read_mistral,
    read_tagged,
    read_xml,
)
from service.codec.reply_reader import Read

_LETTERS = string.ascii_letters + string.digits


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def short_call_id() -> str:
    """Nine letters and digits, which is all that some templates take."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one kind of model writes its calls.

    signs: its template holds all texts of one of these. What a grammar writes: opening; for each call before, its name, middle, its
    arguments as JSON, after; between, where two calls meet; closing.
    triggers, starts and reading: see CallForm; the first trigger is the one that grammars enforce. others: control tokens that it may read
    and never writes.
    """

    name: str
    signs: tuple[tuple[str, ...], ...]
    triggers: tuple[str, ...]
    reading: Callable[[CallReader, str], Read[None]]
    opening: str = ""
    before: str = ""
    middle: str = ""
    after: str = ""
    between: str = ""
    closing: str = ""
    starts: str = ""
    others: tuple[str, ...] = ()
    make_id: Callable[[], str] = call_id

    def read(self, calls: CallReader, trigger: str) -> Read[None]:
        return self.reading(calls, trigger)

    @property
    def is_bare(self) -> bool:
        """Nothing but the object itself says that it is a call."""
        return not (self.opening + self.before).startswith(self.triggers)

    @property
    def has_short_ids(self) -> bool:
        return self.make_id is short_call_id

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything that its calls are known by or written with."""
        return (*self.triggers, self.opening, self.before, self.middle, self.after, self.between, self.closing, *self.others)


_HERMES = Dialect(
    "hermes",
    signs=(("<tool_call>",),),
    triggers=("<tool_call>",),
    reading=read_tagged,
    before='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    after="}\n</tool_call>",
    between="\n",
    starts="{",
)

# The first whose signs a template shows is the model's. The last one is for models that were told of no form: `tools` describes it to
# them in words.
DIALECTS: tuple[Dialect, ...] = (
    Dialect(
        "deepseek",
        signs=((DS_CALLS, "```json"),),
        triggers=(DS_CALLS, DS_CALL),
        reading=read_deepseek,
        opening=DS_CALLS,
        before=f"{DS_CALL}function{DS_SEPARATOR}",
        middle="\n```json\n",
        after=f"\n```{DS_CALL_END}",
        between="\n",
        closing=DS_CALLS_END,
    ),
    Dialect(
        "deepseek-v3.1",
        signs=((DS_CALLS,),),
        triggers=(DS_CALLS, DS_CALL),
        reading=read_deepseek,
        opening=DS_CALLS,
        before=DS_CALL,
        middle=DS_SEPARATOR,
        after=DS_CALL_END,
        closing=DS_CALLS_END,
    ),
    Dialect(
        "mistral",
        signs=(("[TOOL_CALLS]", "[ARGS]"),),
        triggers=("[TOOL_CALLS]",),
        reading=read_mistral,
        before="[TOOL_CALLS]",
        middle="[ARGS]",
        others=("[CALL_ID]",),
        make_id=short_call_id,
    ),
    Dialect(
        "mistral-list",
        signs=(("[TOOL_CALLS]",),),
        triggers=("[TOOL_CALLS]",),
        reading=read_mistral,
        opening="[TOOL_CALLS][",
        before='{"name": "',
        middle='", "arguments": ',
        after="}",
        between=", ",
        closing="]",
        make_id=short_call_id,
    ),
    Dialect(
        "function-gemma",
        signs=(("<start_function_call>",),),
        triggers=("<start_function_call>",),
        reading=read_function_gemma,
        before="<start_function_call>call:",
        after="<end_function_call>",
    ),
    # Where a grammar holds the arguments it writes them as JSON: not every schema can be held in tags.
    replace(
        _HERMES,
        name="qwen-xml",
        signs=(("<function=", "<parameter="),),
        triggers=("<tool_call>", "<function="),
        reading=read_xml,
        starts="",
    ),
    Dialect(
        "granite",
        signs=(("<|tool_call|>",),),
        triggers=("<|tool_call|>", "<tool_call>"),
        reading=read_tagged,
        opening="<|tool_call|>[",
        before='{"name": "',
        middle='", "arguments": ',
        after="}",
        between=", ",
        closing="]",
    ),
    _HERMES,
    Dialect(
        "llama3",
        signs=(("<|python_tag|>",), ("<|start_header_id|>", '"parameters": ')),
        triggers=("<|python_tag|>",),
        reading=read_bare,
        before='{"name": "',
        middle='", "parameters": ',
        after="}",
        between="; ",
        starts="{",
    ),
    replace(
        _HERMES,
        name="generic",
        signs=((),),
        triggers=("<tool_call>", "```json", "```tool_call", "```tool_code"),
        starts="{[",
    ),
)


def dialect_of(template_source: str | None, *, knows_tools: bool) -> Dialect:
    """The dialect whose signs the template shows; the last one when it knows no tools."""
    source = template_source or ""
    if not knows_tools:
        return DIALECTS[-1]
    return next(dialect for dialect in DIALECTS if any(all(sign in source for sign in signs) for signs in dialect.signs))
