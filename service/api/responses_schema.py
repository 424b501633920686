"""What the routes under /v1/responses take: input items, flat tools, forms of text, with every bound.

No HTTP, no engine. `body` reads requests into this; `responses_input` translates them into chat requests, which check the rest.
Long, because every kind of item, tool and option has its own bounds; there is no logic beyond those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag, field_validator

from service.api.schema import (
    INT32,
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_PARTS,
    MAX_STOPS,
    Count,
    Penalty,
    StopString,
    Strict,
    Text,
    TokenId,
    Word,
    bounded,
    is_empty,
    never,
)
from service.api.schema_tools import MAX_TOOLS, ToolName
from service.errors import RequestError

Id = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
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


def _kind(data: Any) -> str | None:
    kind = data.get("type") if isinstance(data, dict) else getattr(data, "type", None)
    return kind if isinstance(kind, str) else None


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
        _kind,
        custom_error_type="content_part",
        custom_error_message="this model takes text only: a part must have type input_text, output_text or refusal",
    ),
]


def _content_kind(content: Any) -> str | None:
    return "text" if isinstance(content, str) else "parts" if isinstance(content, list) else None


ItemContent = Annotated[
    Annotated[Text, Tag("text")] | Annotated[list[ItemPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("parts")],
    Discriminator(_content_kind, custom_error_type="content_type", custom_error_message="must be a string or a list of content parts"),
]


class MessageItem(Strict):
    """Type message may be left out."""

    type: Literal["message"] = "message"
    id: Id | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: ItemContent
    status: Status | None = None
    phase: Word | None = None


class FunctionCallItem(Strict):
    type: Literal["function_call"]
    id: Id | None = None
    call_id: Id
    name: ToolName
    arguments: Text
    status: Status | None = None


class FunctionOutputItem(Strict):
    type: Literal["function_call_output"]
    id: Id | None = None
    call_id: Id
    output: ItemContent
    status: Status | None = None


class CustomCallItem(Strict):
    type: Literal["custom_tool_call"]
    id: Id | None = None
    call_id: Id
    name: ToolName
    input: Text
    status: Status | None = None


class CustomOutputItem(Strict):
    type: Literal["custom_tool_call_output"]
    id: Id | None = None
    call_id: Id
    output: ItemContent
    status: Status | None = None


class ReasoningItem(Strict):
    """encrypted_content: another server's, which can't be read here."""

    type: Literal["reasoning"]
    id: Id | None = None
    summary: Annotated[list[SummaryText], Field(max_length=MAX_PARTS, fail_fast=True)] = Field(default_factory=list)
    content: Annotated[list[ReasoningText], Field(max_length=MAX_PARTS, fail_fast=True)] = Field(default_factory=list)
    encrypted_content: Text | None = None
    status: Status | None = None


class ItemReference(Strict):
    """Stands for an item of a stored response."""

    type: Literal["item_reference"] = "item_reference"
    id: Id


def _item_kind(item: Any) -> str | None:
    """The type; a message and a reference may leave it out."""
    if not isinstance(item, dict):
        return getattr(item, "type", None)
    if item.get("type") is None:
        return "message" if "role" in item else "item_reference" if "id" in item else None
    return _kind(item)


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
        raise ValueError("the tool image_generation is not supported: no image model is served")
    if isinstance(kind, str) and kind not in ("function", "custom"):
        name = "".join(char if 32 < ord(char) < 127 else "?" for char in kind[:64])
        raise ValueError(f"the tool {name} is not supported by this server; allowed types are function and custom")
    return tool


def _tool_kind(tool: Any) -> str | None:
    """Not the bare type: chat's form of a tool has a field of that name, which the place of an error must not lead into."""
    kind = _kind(tool)
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
    kind = "mode" if isinstance(choice, str) else _kind(choice)
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
    verbosity: Literal["low", "medium", "high"] | None = None


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
    "moderation": never,
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

    def unknown_fields(self) -> list[str]:
        """Also of the items, tools and options, as `tools[0].colour`."""
        return [*super().unknown_fields(), *(name for path, part in self._parts() for name in _unknown(path, part))]

    def _parts(self) -> Iterator[tuple[str, Strict]]:
        if isinstance(self.input, list):
            yield from ((f"input[{index}]", item) for index, item in enumerate(self.input))
        yield from ((f"tools[{index}]", tool) for index, tool in enumerate(self.tools))
        if self.text is not None:
            yield "text", self.text
            if self.text.format is not None:
                yield "text.format", self.text.format
        if self.reasoning is not None:
            yield "reasoning", self.reasoning


class ResponsesRequest(PromptFields):
    max_output_tokens: Count | None = None
    max_tool_calls: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[Include], Field(max_length=16, fail_fast=True)] = Field(default_factory=list)
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    store: bool = True
    background: bool = False
    # Accepted and echoed, of no effect on the text.
    metadata: Annotated[dict[str, Word], Field(max_length=MAX_METADATA)] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    user: Word | None = None
    safety_identifier: Word | None = None
    prompt_cache_key: Word | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    # Beyond OpenAI's, as /v1/chat/completions has them, which checks them too.
    top_k: Annotated[int, Field(ge=-1, le=INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128, fail_fast=True)] | None = None
    priority: Annotated[int, Field(ge=-INT32, le=INT32)] | None = None
    timeout: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = None
    cache_salt: Word | None = None

    @field_validator("metadata", mode="before")
    @classmethod
    def _little_metadata(cls, value: Any) -> Any:
        return bounded(value, MAX_METADATA)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

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


def _unknown(path: str, part: Strict) -> list[str]:
    return [f"{path}.{name}" for name in part.unknown_fields()]


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
