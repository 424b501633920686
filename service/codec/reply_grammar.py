"""Grammars of whole replies, as text for `Generate.grammar`: reasoning, free text and tool calls in a model's dialect.

Rules of values come from `grammar`; how calls are written comes from the dialect. Nothing is compiled here. Called by `reply_format`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from service.codec.grammar import lark_rule, object_rule, regex_rule, schema_rule
from service.codec.reply_dialects import Dialect
from service.codec.reply_parser import Marks
from service.codec.special import Special, SpecialTokens
from service.codec.tools import INPUT_BEGIN, INPUT_END, INPUT_KEY, Tool, ToolSet
from service.errors import RequestError

# Without a bound a model that can't stop would call until its tokens are spent.
MOST_CALLS = 64

_ANY = "ANY: /(.|\\n)*/"
# Schemas of these say for themselves what is an object.
_COMPOSED = frozenset({"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"})


@dataclass(frozen=True, slots=True)
class ReplyGrammar:
    """Writes the grammars of one model. marks None: it does not reason."""

    dialect: Dialect
    marks: Marks | None
    special: SpecialTokens

    def of_text(self, rule: str, *, is_reasoning: bool) -> str:
        """Free reasoning where the model reasons, then what the rule admits."""
        return "\n".join((f"body: {rule}", *self._frame(is_reasoning), ""))

    def of_calls(self, tools: ToolSet, *, is_reasoning: bool, text: str) -> str:
        """Reasoning, then calls alone where they are required; else an answer that follows the rule `text`, or free text, or calls in it.

        Raises: RequestError naming the tool's field.
        """
        if tools.mode == "required":
            body = ["body: section", *self._section(tools, 0)]
        elif text:
            body = [f"body: {self._trigger()} section | answer", f"answer: {text}", *self._section(tools, 0)]
        elif self.dialect.is_bare:
            body = [f"body: PROSE | {self._trigger()} section", "PROSE: /([^{\\[ \\t\\r\\n](.|\\n)*)?/", *self._section(tools, 0)]
        else:
            body = ["body: tail | head section" if tools.is_single else f"body: (head section){{0,{MOST_CALLS}}} tail", "tail: ANY"]
            body += [*self._until("head", self.dialect.triggers[0]), *self._section(tools, len(self.dialect.triggers[0]))]
        return "\n".join((*body, *self._frame(is_reasoning), ""))

    def _frame(self, is_reasoning: bool) -> Iterator[str]:
        """The rule start, which ends in a body, and what it needs."""
        yield _ANY
        if self.marks is None:
            yield "start: body"
            return
        yield f"start: {'thought' if is_reasoning else '(begin thought)?'} body"
        yield 'thought: reasoning ("\\n\\n" | "\\n")?'
        yield from self._until("reasoning", self.marks.end)
        # Lazy, for a free text would go on where the mark ends.
        is_special = self.marks.begin in self.special.by_text
        yield f"begin{'' if is_special else '[lazy]'}: {self._literal(self.marks.begin)}"

    def _until(self, name: str, end: str) -> Iterator[str]:
        """A rule for any text up to and with a certain one, which it holds once."""
        is_special = end in self.special.by_text
        yield f"{name}{'' if is_special else '[lazy]'}: ANY {self._literal(end)}"

    def _trigger(self) -> str:
        """A bare call may stand behind a control token; a text would be one more way to write it."""
        dialect = self.dialect
        return f"{self._literal(dialect.triggers[0])}?" if dialect.is_bare and dialect.triggers[0] in self.special.by_text else ""

    def _section(self, tools: ToolSet, num_read: int) -> Iterator[str]:
        """Rules of one or more calls and what stands around them, without the first characters of it, which were read."""
        dialect = self.dialect
        opening = (dialect.opening + dialect.before)[num_read:]
        # Where each call has its own trigger and free text may stand between, one call is a section.
        has_further = not tools.is_single and not (num_read and not dialect.opening)
        further = f"({self._literal(dialect.between)} call){{0,{MOST_CALLS - 1}}}" if has_further else ""
        yield f"section: first {further} {self._literal(dialect.closing)}"
        firsts, calls = [], []
        for index, tool in enumerate(tools.tools):
            if tool.name in tools.allowed:
                yield f"arguments_{index}: {_arguments(tool, f'tools[{index}]')}"
                after = f"arguments_{index} {self._literal(dialect.after)}"
                firsts.append(f"{self._literal(opening + tool.name + dialect.middle)} {after}")
                calls.append(f"{self._literal(dialect.before + tool.name + dialect.middle)} {after}")
        yield f"first: {' | '.join(firsts)}"
        if has_further:
            yield f"call: {' | '.join(calls)}"

    def _literal(self, text: str) -> str:
        """A text as Lark: its control tokens by their ids, for no text spells them."""
        parts = self.special.split(text)
        return " ".join(f"<[{part.id}]>" if isinstance(part, Special) else json.dumps(part, ensure_ascii=False) for part in parts)


def _arguments(tool: Tool, param: str) -> str:
    """The rule of one call's arguments. Raises: RequestError naming the tool's field."""
    if tool.kind == "custom":
        return _input(tool, f"{param}.custom.format.grammar.definition")
    param = f"{param}.function.parameters"
    schema = dict(tool.parameters or {"additionalProperties": False})
    if not _COMPOSED.intersection(schema):
        schema["type"] = "object"
    if schema.get("type", "object") != "object":
        if tool.is_strict:
            raise RequestError(f"{param} must be a schema of an object", param=param, code="invalid_json_schema")
        return object_rule()
    return schema_rule(schema, param, is_strict=tool.is_strict)


def _input(tool: Tool, param: str) -> str:
    if tool.syntax == "lark":
        return f"{json.dumps(INPUT_BEGIN)} {lark_rule(tool.definition, param)} {json.dumps(INPUT_END)}"
    text = {"type": "string"}
    if tool.syntax == "regex":
        regex_rule(tool.definition, param)
        text["pattern"] = f"^(?:{tool.definition})$"
    schema = {"type": "object", "properties": {INPUT_KEY: text}, "required": [INPUT_KEY], "additionalProperties": False}
    return schema_rule(schema, param)
