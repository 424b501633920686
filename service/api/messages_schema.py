"""What POST /v1/messages and /v1/messages/count_tokens take: Anthropic's conversations of blocks, its tools, and every bound.

No HTTP, no engine. `body` reads requests into this; `messages_input` translates it into a chat request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from service.api.schema import (
    INT32,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_STOPS,
    Count,
    StopString,
    Strict,
    Text,
    Word,
    content_kind,
    is_empty,
    never,
    type_of,
)
from service.api.schema_tools import MAX_TOOLS, ToolName
from service.errors import RequestError

_UNBUILT: dict[str, Callable[[Any], bool]] = {"container": never, "context_management": is_empty, "mcp_servers": is_empty}


_ONLY_TEXT = "this model takes text only: a block must have type text"
_TEXT_OR_BLOCKS = "must be a string or a list of content blocks"


class TextBlock(Strict):
    type: Literal["text"]
    text: Text


class TextSource(Strict):
    type: Literal["text"]
    data: Text
    media_type: Literal["text/plain"] = "text/plain"


class DocumentBlock(Strict):
    """A document whose text stands in the request. title and context: told to the model before it."""

    type: Literal["document"]
    source: Annotated[
        Annotated[TextSource, Tag("text")],
        Discriminator(type_of, custom_error_type="source", custom_error_message="only documents of source type text can be read"),
    ]
    title: Word | None = None
    context: Text | None = None


class ThinkingBlock(Strict):
    type: Literal["thinking"]
    thinking: Text
    signature: Text = ""


class RedactedThinkingBlock(Strict):
    type: Literal["redacted_thinking"]
    data: Text


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: Word
    name: ToolName
    input: dict[str, Any]


_ResultBlock = Annotated[
    Annotated[TextBlock, Tag("text")] | Annotated[DocumentBlock, Tag("document")],
    Discriminator(type_of, custom_error_type="content_block", custom_error_message=f"{_ONLY_TEXT} or document"),
]


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: Word
    content: Annotated[
        Annotated[Text, Tag("text")] | Annotated[list[_ResultBlock], Field(max_length=MAX_PARTS, fail_fast=True), Tag("parts")],
        Discriminator(content_kind, custom_error_type="content_type", custom_error_message=_TEXT_OR_BLOCKS),
    ] = ""
    is_error: bool = False


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[DocumentBlock, Tag("document")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")],
    Discriminator(
        type_of,
        custom_error_type="content_block",
        custom_error_message=f"{_ONLY_TEXT}, document, thinking, redacted_thinking, tool_use or tool_result",
    ),
]

# What each role may say.
_ALLOWED: dict[str, frozenset[str]] = {
    "user": frozenset({"text", "document", "tool_result"}),
    "assistant": frozenset({"text", "thinking", "redacted_thinking", "tool_use"}),
    "system": frozenset({"text"}),
}


class MessageParam(Strict):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[Text, Tag("text")] | Annotated[list[Block], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("parts")],
        Discriminator(content_kind, custom_error_type="content_type", custom_error_message=_TEXT_OR_BLOCKS),
    ]

    @property
    def blocks(self) -> list[Any]:
        """The content, a string as the one block that it stands for."""
        return [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else list(self.content)

    def check_blocks(self, param: str) -> None:
        """Raises: RequestError for a block that is not the role's to say."""
        for index, block in enumerate(self.blocks):
            if block.type not in _ALLOWED[self.role]:
                allowed = ", ".join(sorted(_ALLOWED[self.role]))
                where = f"{param}.content[{index}]"
                raise RequestError(f"{where}: a {self.role} message can't have a {block.type} block; there are {allowed}", param=where)


class MessagesTool(Strict):
    """input_schema: a JSON schema of the tool's arguments."""

    type: Literal["custom"] = "custom"
    name: ToolName
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool = False


def _tool_kind(tool: Any) -> str | None:
    is_silent = isinstance(tool, dict) and tool.get("type") is None
    return "custom" if is_silent else type_of(tool)


MessagesToolUnion = Annotated[
    Annotated[MessagesTool, Tag("custom")],
    Discriminator(
        _tool_kind,
        custom_error_type="tool",
        custom_error_message="a tool must be the client's own, of type custom; tools that run on the server are not built",
    ),
]


class MessagesToolChoice(Strict):
    """name: of the tool, with type tool alone."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Strict):
    """budget_tokens: with type enabled; adaptive leaves it to the model."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None
    display: Word | None = None


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class MessagesMetadata(Strict):
    user_id: Word | None = None


class ConversationFields(Strict):
    """What decides on the prompt. cache_control is accepted without effect: the prefix cache needs no marks."""

    unbuilt: ClassVar[Mapping[str, Callable[[Any], bool]]] = _UNBUILT

    model: Word
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Annotated[
        Annotated[Text, Tag("text")] | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True), Tag("parts")],
        Discriminator(content_kind, custom_error_type="content_type", custom_error_message=_TEXT_OR_BLOCKS),
    ] = ""
    tools: Annotated[list[MessagesToolUnion], Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True)]
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None

    def check(self) -> None:
        for index, message in enumerate(self.messages):
            message.check_blocks(f"messages[{index}]")
        choice = self.tool_choice
        if choice is not None and (choice.type == "tool") != (choice.name is not None):
            raise RequestError("tool_choice.name must be given with type tool, and only then", param="tool_choice.name")


class CountTokensRequest(ConversationFields):
    pass


class MessagesRequest(ConversationFields):
    max_tokens: Count
    temperature: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32)] | None = None
    stop_sequences: Annotated[list[StopString], Field(default_factory=list, max_length=MAX_STOPS, fail_fast=True)]
    stream: bool = False
    metadata: MessagesMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def check(self) -> None:
        super().check()
        budget = self.thinking.budget_tokens if self.thinking is not None else None
        if budget is not None and budget >= self.max_tokens:
            raise RequestError("thinking.budget_tokens must be less than max_tokens", param="thinking.budget_tokens")
