"""The tools a request offers and how the model may choose among them: plain values that templates, grammars and parsers all read.

No HTTP and no schema of a request: the API makes these from checked requests. Used by prompt, reply and the grammars.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


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
