"""The tools of a chat request and the choice among them, in OpenAI's current form and its older one, as a checked `ToolSet`.

No HTTP, no engine. `schema_chat` has them as fields; the parameters' schemas are looked into by `codec.grammar` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag

from service.api.schema import Strict, Text, type_of
from service.codec.tools import Tool, ToolSet
from service.errors import RequestError

MAX_TOOLS = 256

ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class FunctionDefinition(Strict):
    """parameters: a JSON schema; absent is a function without arguments."""

    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def as_tool(self) -> Tool:
        return Tool(self.name, self.description or "", "function", self.parameters, is_strict=bool(self.strict))


class FunctionTool(Strict):
    type: Literal["function"]
    function: FunctionDefinition

    def as_tool(self) -> Tool:
        return self.function.as_tool()


class CustomGrammar(Strict):
    syntax: Literal["lark", "regex"]
    definition: Text


class CustomFormat(Strict):
    type: Literal["text", "grammar"]
    grammar: CustomGrammar | None = None


class CustomDefinition(Strict):
    name: ToolName
    description: Text | None = None
    format: CustomFormat | None = None


class CustomTool(Strict):
    type: Literal["custom"]
    custom: CustomDefinition

    def as_tool(self) -> Tool:
        given = self.custom.format
        if given is None or given.type == "text" or given.grammar is None:
            return Tool(self.custom.name, self.custom.description or "", "custom")
        grammar = given.grammar
        return Tool(self.custom.name, self.custom.description or "", "custom", syntax=grammar.syntax, definition=grammar.definition)


ToolDefinition = Annotated[
    Annotated[FunctionTool, Tag("function")] | Annotated[CustomTool, Tag("custom")],
    Discriminator(type_of, custom_error_type="tool", custom_error_message="a tool must have type function or custom; others are not built"),
]


class NamedOnly(Strict):
    name: ToolName


class NamedFunction(Strict):
    type: Literal["function"]
    function: NamedOnly


class NamedCustom(Strict):
    type: Literal["custom"]
    custom: NamedOnly


NamedTool = Annotated[
    Annotated[NamedFunction, Tag("function")] | Annotated[NamedCustom, Tag("custom")],
    Discriminator(type_of, custom_error_type="tool", custom_error_message="a tool must have type function or custom"),
]


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedChoice(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_kind(choice: Any) -> str | None:
    return "mode" if isinstance(choice, str) else type_of(choice)


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")]
    | Annotated[NamedFunction, Tag("function")]
    | Annotated[NamedCustom, Tag("custom")]
    | Annotated[AllowedChoice, Tag("allowed_tools")],
    Discriminator(
        _choice_kind,
        custom_error_type="tool_choice",
        custom_error_message="must be none, auto, required, or an object of type function, custom or allowed_tools",
    ),
]


def _function_call_kind(choice: Any) -> str:
    return "mode" if isinstance(choice, str) else "named"


FunctionCall = Annotated[
    Annotated[Literal["none", "auto"], Tag("mode")] | Annotated[NamedOnly, Tag("named")], Discriminator(_function_call_kind)
]


def tool_set(definitions: Sequence[FunctionTool | CustomTool], choice: Any, is_parallel: bool) -> ToolSet | None:
    """What the model may call; None when it may call nothing. choice: a `ToolChoice`, None for the usual one.

    Raises: RequestError when the choice names what is not there, or a name comes twice.
    """
    tools = tuple(definition.as_tool() for definition in definitions)
    _check_names(definitions, tools)
    if choice == "none" or (choice is None and not tools):
        return None
    if not tools:
        raise RequestError("tool_choice is only allowed together with tools", param="tool_choice")
    names = tuple(tool.name for tool in tools)
    if choice is None or choice == "auto":
        return ToolSet(tools, names, is_parallel=is_parallel)
    if choice == "required":
        return ToolSet(tools, names, "required", is_parallel=is_parallel)
    if isinstance(choice, AllowedChoice):
        wanted = [
            _known(named, tools, f"tool_choice.allowed_tools.tools[{index}]") for index, named in enumerate(choice.allowed_tools.tools)
        ]
        allowed = tuple(name for name in names if name in wanted)
        return ToolSet(tools, allowed, choice.allowed_tools.mode, is_parallel=is_parallel)
    return ToolSet(tools, (_known(choice, tools, "tool_choice"),), "required", is_named=True, is_parallel=False)


def _known(named: NamedFunction | NamedCustom, tools: Sequence[Tool], param: str) -> str:
    name = named.function.name if isinstance(named, NamedFunction) else named.custom.name
    if not any(tool.name == name and tool.kind == named.type for tool in tools):
        raise RequestError(f"there is no {named.type} tool called {name} among the tools", param=f"{param}.{named.type}.name")
    return name


def _check_names(definitions: Sequence[FunctionTool | CustomTool], tools: Sequence[Tool]) -> None:
    seen: set[str] = set()
    for index, (definition, tool) in enumerate(zip(definitions, tools, strict=True)):
        param = f"tools[{index}].{definition.type}"
        if tool.name in seen:
            raise RequestError(f"{param}.name: there are two tools called {tool.name}", param=f"{param}.name")
        seen.add(tool.name)
        if isinstance(definition, CustomTool) and definition.custom.format is not None:
            given = definition.custom.format
            if given.type == "grammar" and given.grammar is None:
                raise RequestError(
                    f"{param}.format.grammar is required", param=f"{param}.format.grammar", code="missing_required_parameter"
                )
