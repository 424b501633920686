"""A model's way to answer: the dialect of its tool calls and its reasoning marks, told from its chat template.

Knows no HTTP. `prompt` makes one for each model; the API asks it for a parser and a grammar for each choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from service.codec.reply import PlainText, ReplyParser
from service.codec.reply_dialects import Dialect, dialect_of
from service.codec.reply_grammar import ReplyGrammar
from service.codec.reply_parser import CallForm, DialectParser, Marks
from service.codec.special import Special
from service.codec.template import PROBE, ChatTemplate
from service.codec.tokenizer import Tokenizer
from service.codec.tools import Tool, ToolSet

# What models write around their reasoning, by the marks that their templates know.
_MARKS = (
    Marks("<think>", "</think>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
    Marks("<reasoning>", "</reasoning>"),
)
# How far back from a prompt's end its last turn is looked for, in tokens, where no control token begins it.
_MOST_TAIL = 4096
_NO_TOOLS = ToolSet((), ())


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """marks: around reasoning, None for a model without. knows_tools: the template tells the model of tools; else `tools` does, in
    words. knows_system: the template takes system messages."""

    tokenizer: Tokenizer
    dialect: Dialect
    marks: Marks | None
    knows_tools: bool
    knows_system: bool

    def is_reasoning(self, prompt: Sequence[int]) -> bool:
        """Does a reply to this prompt begin inside reasoning, because the template (or the message that is continued) opened it?"""
        if self.marks is None:
            return False
        tail, has_turn = self._last_turn(prompt)
        if not has_turn:  # a mark in an earlier message could be taken for the template's
            return tail.rstrip().endswith(self.marks.begin)
        return tail.rfind(self.marks.begin) > tail.rfind(self.marks.end)

    def _last_turn(self, prompt: Sequence[int]) -> tuple[str, bool]:
        """The text behind the prompt's last control token that is no mark, and whether there is such a token."""
        special = self.tokenizer.special
        marks = {token.id for token in special.by_text.values() if self.marks and token.text in (self.marks.begin, self.marks.end)}
        first = max(len(prompt) - _MOST_TAIL, 0)
        begin = next(
            (at + 1 for at in range(len(prompt) - 1, first - 1, -1) if prompt[at] in special.ids and prompt[at] not in marks), None
        )
        return self.tokenizer.decode(prompt[first if begin is None else begin :], skip_special=False), begin is not None

    def is_plain(self, tools: ToolSet | None) -> bool:
        """Is a reply text and nothing else, so that no parser is needed?"""
        return self.marks is None and tools is None

    def shown(self, tools: ToolSet | None) -> frozenset[int]:
        """Ids of special tokens that the parser must see as text: for TextStream(..., shown=...)."""
        texts: list[str] = [*((self.marks.begin, self.marks.end) if self.marks else ()), *(self.dialect.texts if tools else ())]
        split = self.tokenizer.special.split
        return frozenset(part.id for text in texts for part in split(text) if isinstance(part, Special))

    def parser(self, tools: ToolSet | None, *, is_reasoning: bool = False) -> ReplyParser:
        """For one choice. tools None: no calls, whatever it writes. is_reasoning: what `is_reasoning(prompt)` said."""
        if self.is_plain(tools):
            return PlainText()
        form = self._form(tools) if tools else None
        return DialectParser(self.marks, form, tools or _NO_TOOLS, self.dialect.make_id, is_reasoning=is_reasoning)

    def _form(self, tools: ToolSet) -> CallForm:
        """The dialect; where calls are enforced only the form that the grammar watches, so that no other gets past it."""
        dialect = self.dialect
        if not tools.is_enforced:
            return dialect
        if not dialect.is_bare:
            return replace(dialect, triggers=dialect.triggers[:1], starts="")
        return replace(dialect, triggers=tuple(text for text in dialect.triggers if text in self.tokenizer.special.by_text))

    def grammar(self, tools: ToolSet, *, is_reasoning: bool = False, text: str = "") -> str:
        """For Generate.grammar; "" when nothing has to be enforced. text: the rule (schema_rule and its like) that an answer without
        calls has to follow, "" for any text; it means nothing where a call is required.

        Raises: RequestError naming the tool's field.
        """
        if not tools.is_enforced and not text:
            return ""
        return self._grammars().of_calls(tools, is_reasoning=is_reasoning, text=text)

    def after_reasoning(self, rule: str, *, is_reasoning: bool = False) -> str:
        """For Generate.grammar: free reasoning where the model reasons, then the rule (schema_rule and its like)."""
        return self._grammars().of_text(rule, is_reasoning=is_reasoning)

    def _grammars(self) -> ReplyGrammar:
        return ReplyGrammar(self.dialect, self.marks, self.tokenizer.special)


def reply_format(template: ChatTemplate | None, tokenizer: Tokenizer) -> ReplyFormat:
    """Renders two small conversations to see what the template writes; None has no tools and no reasoning."""
    source = template.source if template else ""
    tool = Tool(PROBE).as_template_input()
    knows_tools = template is not None and template.knows("user", tools=[tool])
    knows_system = template is not None and template.knows("system")
    marks = next((marks for marks in _MARKS if marks.begin in source or marks.end in source), None)
    return ReplyFormat(tokenizer, dialect_of(source, knows_tools=knows_tools), marks, knows_tools, knows_system)
