"""What POST /v1/chat/completions takes: messages, tools, forms of output, with every bound. The other chat-like routes translate into it.

No HTTP, no engine. `body` reads requests into this; `dialogue` turns it into work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from service.api.schema import (
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_PARTS,
    MAX_STOPS,
    UNBUILT,
    Count,
    SamplingFields,
    Strict,
    Text,
    Word,
    bounded,
    equals,
    is_empty,
    never,
)
from service.errors import RequestError

_UNBUILT_CHAT: dict[str, Callable[[Any], bool]] = {
    "add_generation_prompt": equals(True),
    "audio": never,
    "chat_template": never,
    "chat_template_kwargs": is_empty,
    "continue_final_message": equals(False),
    "documents": is_empty,
    "echo": equals(False),
    "function_call": equals("none"),
    "functions": is_empty,
    "mm_processor_kwargs": is_empty,
    "modalities": equals(["text"]),
    "thinking_token_budget": never,
    "tool_choice": equals("none"),
    "tools": is_empty,
}


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: Text


class CalledFunction(Strict):
    name: Word
    arguments: Text


class ToolCall(Strict):
    id: Word
    type: Literal["function"] = "function"
    function: CalledFunction


def _part_kind(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return kind if isinstance(kind, str) else None


def _content_kind(content: Any) -> str | None:
    return "text" if isinstance(content, str) else "parts" if isinstance(content, list) else None


Part = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[RefusalPart, Tag("refusal")],
    Discriminator(
        _part_kind, custom_error_type="content_part", custom_error_message="this model takes text only: a part must have type text"
    ),
]
Content = Annotated[
    Annotated[Text, Tag("text")] | Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("parts")],
    Discriminator(
        _content_kind, custom_error_type="content_type", custom_error_message="content must be a string or a list of content parts"
    ),
]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Word | None = None
    tool_call_id: Word | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    refusal: Text | None = None
    reasoning_content: Text | None = None

    def check_role(self, param: str) -> None:
        """Raises: RequestError when the role asks for a field that is not there."""
        if self.role == "tool" and self.tool_call_id is None:
            raise RequestError("a tool message needs the tool_call_id that it answers", param=f"{param}.tool_call_id")
        if self.tool_calls and self.role != "assistant":
            raise RequestError("only assistant messages can have tool_calls", param=f"{param}.tool_calls")
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal is not None)):
            raise RequestError(f"a message of role {self.role} needs content", param=f"{param}.content")

    def as_template_input(self) -> dict[str, Any]:
        """The fields that templates know, those that were given."""
        return self.model_dump(include=set(type(self).model_fields), exclude_none=True)


class ChatRequest(SamplingFields):
    unbuilt: ClassVar[Mapping[str, Callable[[Any], bool]]] = {**UNBUILT, **_UNBUILT_CHAT}
    prompt_param: ClassVar[str] = "messages"

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    # Accepted, of no effect on the text here.
    metadata: Annotated[dict[str, Word], Field(max_length=MAX_METADATA)] | None = None
    store: bool | None = None
    service_tier: Word | None = None
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None
    verbosity: Word | None = None
    reasoning_effort: Word | None = None
    safety_identifier: Word | None = None
    prompt_cache_key: Word | None = None
    prompt_cache_retention: Word | None = None

    @field_validator("metadata", mode="before")
    @classmethod
    def _little_metadata(cls, value: Any) -> Any:
        return bounded(value, MAX_METADATA)

    def check(self) -> None:
        super().check()
        for index, message in enumerate(self.messages):
            message.check_role(f"messages[{index}]")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise RequestError("response_format other than text is not supported", param="response_format", code="unsupported_parameter")

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wanted_param(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens is not None else "max_tokens"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def unknown_fields(self) -> list[str]:
        """Also of the messages, as `messages[1].colour`."""
        nested = [f"messages[{index}].{key}" for index, message in enumerate(self.messages) for key in message.unknown_fields()]
        return super().unknown_fields() + nested
