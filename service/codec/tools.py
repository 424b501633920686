"""The tools a request offers and how the model may choose among them: plain values that templates, grammars and parsers all read.

No HTTP and no schema of a request: the API makes these from checked requests. Used by prompt, reply and the grammars.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# A custom tool's input travels as the one string of an object. Where its grammar can't be written inside a JSON string, it travels raw
# between these marks instead.
INPUT_KEY = "input"
INPUT_BEGIN, INPUT_END = "<input>", "</input>"

_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_ONE_INPUT: dict[str, Any] = {"type": "object", "properties": {INPUT_KEY: {"type": "string"}}, "required": [INPUT_KEY]}


@dataclass(frozen=True, slots=True)
class Tool:
    """One function or custom tool. parameters: a JSON schema, None for no arguments; of a custom tool always None. is_strict: its
    arguments have to follow the schema. syntax and definition: the grammar of a custom tool's input, None for free text."""

    name: str
    description: str = ""
    kind: Literal["function", "custom"] = "function"
    parameters: Mapping[str, Any] | None = None
    is_strict: bool = False
    syntax: Literal["lark", "regex"] | None = None
    definition: str = ""

    @property
    def is_enforced(self) -> bool:
        """Whether a call of it has to follow something more than being a call."""
        return self.is_strict or self.syntax is not None

    def as_template_input(self) -> dict[str, Any]:
        """As templates know tools, all of which are functions to them."""
        parameters = self.parameters or _NO_PARAMETERS
        description = self.description
        if self.kind == "custom":
            parameters = _ONE_INPUT
            if self.syntax is not None:
                kind = {"lark": "this Lark grammar", "regex": "this regular expression"}[self.syntax]
                description = f"{description}\nThe input must follow {kind}:\n{self.definition}".lstrip()
        return {"type": "function", "function": {"name": self.name, "description": description, "parameters": parameters}}


@dataclass(frozen=True, slots=True)
class ToolSet:
    """tools: those the model is told about. allowed: names that it may call, in the tools' order. mode: may it call, or must it?
    is_named: one certain tool was asked for, so the answer is its call alone. is_parallel: may there be several calls?"""

    tools: tuple[Tool, ...]
    allowed: tuple[str, ...]
    mode: Literal["auto", "required"] = "auto"
    is_named: bool = False
    is_parallel: bool = True

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        return tuple(tool for tool in self.tools if tool.name in self.allowed)

    @property
    def is_single(self) -> bool:
        """At most one call may come."""
        return self.is_named or not self.is_parallel

    @property
    def is_enforced(self) -> bool:
        """Whether how calls are written can't be left to the model."""
        return self.mode == "required" or any(tool.is_enforced for tool in self.callable_tools)


_HOW = """You can call functions. They are described here, one JSON object a line, inside <tools></tools>:
<tools>
{tools}
</tools>

To call a function, answer with one JSON object inside <tool_call></tool_call>, with its name and its arguments, and nothing after it:
<tool_call>
{{"name": "<name of the function>", "arguments": <object with the arguments>}}
</tool_call>
Call a function only where it is needed; otherwise answer as usual."""


def tools_in_words(tools: Sequence[Mapping[str, Any]]) -> str:
    """What a model is told whose template knows no tools. tools: as templates know them."""
    return _HOW.format(tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))


def call_in_words(name: str, arguments: Any) -> str:
    """An earlier call as such a model would have written it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def results_in_words(results: Iterable[str]) -> str:
    """Results of calls as such a model is told of them."""
    return "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)
