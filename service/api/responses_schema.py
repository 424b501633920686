"""What the routes under /v1/responses take: input items, flat tools, forms of text, with every bound.

No HTTP, no engine. `body` reads requests into this; `responses_input` translates them into chat requests, which check the rest.
Long, because every kind of item, tool and option has its own bounds; there is no logic beyond those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag

from service.api.schema import (
    INT32,
    MAX_MESSAGES,
    MAX_PARTS,
    CacheRetention,
    Count,
    Effort,
    Metadata,
    MinP,
    MinTokens,
    NumTop,
    Penalty,
    Priority,
    RepetitionPenalty,
    Seed,
    ServiceTier,
    StopIds,
    Stops,
    Strict,
    Temperature,
    Text,
    Timeout,
    TopK,
    TopP,
    Verbosity,
    Word,
    content_kind,
    is_empty,
    never,
    type_of,
)
from service.api.schema_tools import MAX_TOOLS, ToolName
from service.errors import RequestError

Id = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]
# What a client may ask to be included. Only the first changes an answer here; the others belong to tools that are not built.
Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
LOGPROBS: Include = "message.output_text.logprobs"


# --- input items


class InputText(Strict):
    type: Literal["input_text"]
    text: Text


class OutputText(Strict):
    """annotations and logprobs: what an answer had; they say nothing to the model."""

    type: Literal["output_text"]
    text: Text
    annotations: Annotated[list[Any], Field(max_length=MAX_PARTS)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=INT32)] | None = None


class OutputRefusal(Strict):
    type: Literal["refusal"]
    refusal: Text


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: Text


class SummaryText(Strict):
    type: Literal["summary_text"]
    text: Text


ItemPart = Annotated[
    Annotated[InputText, Tag("input_text")] | Annotated[OutputText, Tag("output_text")] | Annotated[OutputRefusal, Tag("refusal")],
    Discriminator(
        type_of,
        custom_error_type="content_part",
        custom_error_message="this model takes text only: a part must have type input_text, output_text or refusal",
    ),
]


ItemContent = Annotated[
    Annotated[Text, Tag("text")] | Annotated[list[ItemPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("parts")],
    Discriminator(content_kind, custom_error_type="content_type", custom_error_message="must be a string or a list of content parts"),
]


class ItemFields(Strict):
    """What every item may have."""

    id: Id | None = None
    status: Status | None = None


class MessageItem(ItemFields):
    """Type message may be left out."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: ItemContent
    phase: Word | None = None


class FunctionCallItem(ItemFields):
    type: Literal["function_call"]
    call_id: Id
    name: ToolName
    arguments: Text


class FunctionOutputItem(ItemFields):
    type: Literal["function_call_output"]
    call_id: Id
    output: ItemContent


class CustomCallItem(ItemFields):
    type: Literal["custom_tool_call"]
    call_id: Id
    name: ToolName
    input: Text


class CustomOutputItem(ItemFields):
    type: Literal["custom_tool_call_output"]
    call_id: Id
    output: ItemContent


class ReasoningItem(ItemFields):
    """encrypted_content: another server's, which can't be read here."""

    type: Literal["reasoning"]
    summary: Annotated[list[SummaryText], Field(max_length=MAX_PARTS, fail_fast=True)] = Field(default_factory=list)
    content: Annotated[list[ReasoningText], Field(max_length=MAX_PARTS, fail_fast=True)] = Field(default_factory=list)
    encrypted_content: Text | None = None


class ItemReference(Strict):
    """Stands for an item of a stored response."""

    type: Literal["item_reference"] = "item_reference"
    id: Id


def _item_kind(item: Any) -> str | None:
    """The type; a message and a reference may leave it out."""
    if isinstance(item, dict) and item.get("type") is None:
        return "message" if "role" in item else "item_reference" if "id" in item else None
    return type_of(item)


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")]
    | Annotated[CustomCallItem, Tag("custom_tool_call")]
    | Annotated[CustomOutputItem, Tag("custom_tool_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(
        _item_kind,
        custom_error_type="input_item",
        custom_error_message="must be a message, function_call, function_call_output, custom_tool_call, custom_tool_call_output, "
        "reasoning or item_reference",
    ),
]


def _input_kind(given: Any) -> str | None:
    return "text" if isinstance(given, str) else "items" if isinstance(given, list) else None


Input = Annotated[
    Annotated[Text, Tag("text")] | Annotated[list[InputItem], Field(max_length=MAX_MESSAGES, fail_fast=True), Tag("items")],
    Discriminator(_input_kind, custom_error_type="input_type", custom_error_message="must be a string or a list of items"),
]


# --- tools


class FlatFunction(Strict):
    """strict absent is false: arguments are held to the schema only where that is asked for or a call is forced."""

    type: Literal["function"]
    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatFormat(Strict):
    """syntax and definition: of type grammar."""

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: Text | None = None


class FlatCustom(Strict):
    type: Literal["custom"]
    name: ToolName
    description: Text | None = None
    format: FlatFormat | None = None


def _built_tool(tool: Any) -> Any:
    """Raises: ValueError naming a type of tool that is not built."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind == "image_generation":
        raise ValueError("the tool image_generation is not supported here; /v1/images/generations draws, and so do chats with modalities")
    if isinstance(kind, str) and kind not in ("function", "custom"):
        name = "".join(char if 32 < ord(char) < 127 else "?" for char in kind[:64])
        raise ValueError(f"the tool {name} is not supported by this server; allowed types are function and custom")
    return tool


def _tool_kind(tool: Any) -> str | None:
    """Not the bare type: chat's form of a tool has a field of that name, which the place of an error must not lead into."""
    kind = type_of(tool)
    return None if kind is None else f"flat {kind}"


FlatTool = Annotated[
    Annotated[
        Annotated[FlatFunction, Tag("flat function")] | Annotated[FlatCustom, Tag("flat custom")],
        Discriminator(_tool_kind, custom_error_type="tool", custom_error_message="a tool must have type function or custom"),
    ],
    BeforeValidator(_built_tool),
]


class FlatNamed(Strict):
    type: Literal["function", "custom"]
    name: ToolName


class FlatAllowed(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FlatNamed], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


def _choice_kind(choice: Any) -> str | None:
    kind = "mode" if isinstance(choice, str) else type_of(choice)
    return "named" if kind in ("function", "custom") else kind


FlatChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")]
    | Annotated[FlatNamed, Tag("named")]
    | Annotated[FlatAllowed, Tag("allowed_tools")],
    Discriminator(
        _choice_kind,
        custom_error_type="tool_choice",
        custom_error_message="must be none, auto, required, or an object of type function, custom or allowed_tools",
    ),
]


# --- the form of the answer


class TextFormat(Strict):
    """name, schema and strict: of type json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] | None = None
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Verbosity | None = None


class ReasoningOptions(Strict):
    """summary: accepted; the whole reasoning is told, and no summary is written."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseStreamOptions(Strict):
    """include_obfuscation: accepted; there is none."""

    include_obfuscation: bool = False


# --- the requests

_UNBUILT: dict[str, Callable[[Any], bool]] = {
    "context_management": is_empty,
    "conversation": never,
    "prompt": never,
}


class PromptFields(Strict):
    """What becomes the prompt: of a response, and of a count of its tokens."""

    unbuilt: ClassVar[Mapping[str, Callable[[Any], bool]]] = _UNBUILT

    model: Word | None = None
    input: Input | None = None
    instructions: Text | None = None
    previous_response_id: Id | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(default_factory=list)
    tool_choice: FlatChoice | None = None
    parallel_tool_calls: bool = True
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] = "disabled"
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        if self.input is None and self.instructions is None and self.previous_response_id is None:
            raise RequestError("input is required", param="input", code="missing_required_parameter")
        for index, tool in enumerate(self.tools):
            _check_tool(tool, f"tools[{index}]")
        if self.text is not None and self.text.format is not None:
            _check_format(self.text.format)


class ResponsesRequest(PromptFields):
    max_output_tokens: Count | None = None
    max_tool_calls: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_logprobs: NumTop | None = None
    include: Annotated[list[Include], Field(max_length=16, fail_fast=True)] = Field(default_factory=list)
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    store: bool = True
    background: bool = False
    # Accepted and echoed, of no effect on the text.
    metadata: Metadata | None = None
    service_tier: ServiceTier | None = None
    user: Word | None = None
    safety_identifier: Word | None = None
    prompt_cache_key: Word | None = None
    prompt_cache_retention: CacheRetention | None = None
    prompt_cache_options: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    # Beyond OpenAI's, as /v1/chat/completions has them, which checks them too.
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    ignore_eos: bool | None = None
    min_tokens: MinTokens | None = None
    stop_token_ids: StopIds | None = None
    priority: Priority | None = None
    timeout: Timeout | None = None
    cache_salt: Word | None = None

    def check(self) -> None:
        super().check()
        if self.background and not self.store:
            raise RequestError("background is only allowed when store is true", param="background")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", param="stream_options")

    @property
    def has_logprobs(self) -> bool:
        return LOGPROBS in self.include or bool(self.top_logprobs)


class InputTokensRequest(PromptFields):
    """POST /v1/responses/input_tokens."""


def _check_tool(tool: FlatFunction | FlatCustom, param: str) -> None:
    if not isinstance(tool, FlatCustom) or tool.format is None or tool.format.type == "text":
        return
    for name in ("syntax", "definition"):
        if getattr(tool.format, name) is None:
            field = f"{param}.format.{name}"
            raise RequestError(f"{field} is required", param=field, code="missing_required_parameter")


def _check_format(form: TextFormat) -> None:
    if form.type != "json_schema":
        return
    for name, value in (("name", form.name), ("schema", form.schema_)):
        if value is None:
            field = f"text.format.{name}"
            raise RequestError(f"{field} is required", param=field, code="missing_required_parameter")
