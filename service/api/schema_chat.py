"""What POST /v1/chat/completions takes: messages, tools, forms of output, with every bound. The other chat-like routes translate into it.

No HTTP, no engine. `body` reads requests into this; `dialogue` turns it into work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, field_validator

from service.api.schema import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_STOPS,
    UNBUILT,
    CacheRetention,
    Count,
    Effort,
    Metadata,
    NumTop,
    ServiceTier,
    Strict,
    Text,
    Verbosity,
    Word,
    bounded,
    content_kind,
    is_empty,
    never,
    type_of,
)
from service.api.schema_format import FormatFields
from service.api.schema_tools import (
    MAX_TOOLS,
    FunctionCall,
    FunctionDefinition,
    FunctionTool,
    NamedFunction,
    NamedOnly,
    ToolChoice,
    ToolDefinition,
    tool_set,
)
from service.codec.tools import ToolSet
from service.errors import RequestError

_UNBUILT_CHAT: dict[str, Callable[[Any], bool]] = {
    "audio": never,
    "chat_template": never,
    "documents": is_empty,
    "mm_processor_kwargs": is_empty,
    "thinking_token_budget": never,
    "web_search_options": never,
}
MAX_TOTAL_PARTS = 16_384
MAX_TEMPLATE_KWARGS = 16


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: Text


class ImageUrl(Strict):
    url: Text
    detail: Literal["auto", "low", "high", "original"] = "auto"


class ImagePart(Strict):
    """A picture, as a data URL or one of a host that the operator lists. In an assistant's message: one that it drew. index: of its place
    in the answer, as clients send it back."""

    type: Literal["image_url"]
    image_url: ImageUrl
    index: int | None = None


class CalledFunction(Strict):
    name: Word
    arguments: Text


class FunctionToolCall(Strict):
    id: Word
    type: Literal["function"] = "function"
    function: CalledFunction


class CalledCustom(Strict):
    name: Word
    input: Text


class CustomToolCall(Strict):
    id: Word
    type: Literal["custom"]
    custom: CalledCustom


def _call_kind(call: Any) -> str | None:
    """The type, which calls of functions may leave out."""
    is_silent = isinstance(call, dict) and call.get("type") is None
    return "function" if is_silent else type_of(call)


ToolCall = Annotated[
    Annotated[FunctionToolCall, Tag("function")] | Annotated[CustomToolCall, Tag("custom")],
    Discriminator(_call_kind, custom_error_type="tool_call", custom_error_message="a tool call must have type function or custom"),
]


Part = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[RefusalPart, Tag("refusal")] | Annotated[ImagePart, Tag("image_url")],
    Discriminator(type_of, custom_error_type="content_part", custom_error_message="a part must have type text or image_url"),
]
Content = Annotated[
    Annotated[Text, Tag("text")] | Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("parts")],
    Discriminator(
        content_kind, custom_error_type="content_type", custom_error_message="content must be a string or a list of content parts"
    ),
]


class Message(Strict):
    """reasoning_content and reasoning are two names of one thing. prefix: of the last message, which the answer then continues. images: of
    an assistant's message; they stand behind its text."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: Word | None = None
    tool_call_id: Word | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    function_call: CalledFunction | None = None
    refusal: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    prefix: bool = False
    images: Annotated[list[ImagePart], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None

    def check_role(self, param: str) -> None:
        """Raises: RequestError when the role asks for a field that is not there, or has one that is another's."""
        if self.role == "tool" and self.tool_call_id is None:
            raise RequestError("a tool message needs the tool_call_id that it answers", param=f"{param}.tool_call_id")
        if self.role == "function" and self.name is None:
            raise RequestError("a function message needs the name of the function", param=f"{param}.name")
        for field in ("tool_calls", "function_call"):
            if getattr(self, field) and self.role != "assistant":
                raise RequestError(f"only assistant messages can have {field}", param=f"{param}.{field}")
        if self.images and self.role != "assistant":
            raise RequestError("only assistant messages can have images; others have parts of type image_url", param=f"{param}.images")
        if self.role not in ("user", "assistant") and (place := next(iter(self.pictures(param)), None)) is not None:
            raise RequestError("only messages of the user and the assistant can have pictures", param=place)
        thought = self.reasoning_content or self.reasoning  # of an answer that was cut while it reasoned
        has_other = self.tool_calls or self.function_call or self.refusal is not None or thought or self.images
        if self.content is None and not (self.role == "assistant" and has_other):
            raise RequestError(f"a message of role {self.role} needs content", param=f"{param}.content")

    def as_template_input(self) -> dict[str, Any]:
        """The fields that templates know, those that were given; what has an older or another form in the form of functions."""
        wanted = {"role", "content", "name", "tool_call_id", "refusal"}
        given = self.model_dump(include=wanted, exclude_none=True)
        if any(True for _ in self.pictures("")):
            text = given.get("content") or ""
            parts = text if isinstance(text, list) else [{"type": "text", "text": text}] if text else []
            parts = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
            given["content"] = [*parts, *({"type": "image"} for _ in self.images or ())]
        if self.role == "function":
            given["role"] = "tool"
        if (reasoning := self.reasoning_content if self.reasoning_content is not None else self.reasoning) is not None:
            given["reasoning_content"] = reasoning
        calls = [_as_function(call) for call in self.tool_calls or ()]
        if self.function_call is not None:
            calls.append({"type": "function", "function": self.function_call.model_dump(include={"name", "arguments"})})
        return {**given, "tool_calls": calls} if calls else {"content": "", **given}

    def text(self) -> str:
        """Of the content, parts joined."""
        if isinstance(self.content, list):
            texts = (part for part in self.content if not isinstance(part, ImagePart))
            return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in texts)
        return self.content or ""

    def pictures(self, param: str) -> dict[str, str]:
        """URLs of its pictures by their fields, in the order in which the model reads them. param: of the message."""
        parts = self.content if isinstance(self.content, list) else []
        found = {f"{param}.content[{index}]": part.image_url.url for index, part in enumerate(parts) if isinstance(part, ImagePart)}
        return {**found, **{f"{param}.images[{index}]": part.image_url.url for index, part in enumerate(self.images or ())}}


def _as_function(call: FunctionToolCall | CustomToolCall) -> dict[str, Any]:
    if isinstance(call, FunctionToolCall):
        return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": call.function.arguments}}
    arguments = json.dumps({"input": call.custom.input}, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.custom.name, "arguments": arguments}}


Scalar = Annotated[bool | int | float | Annotated[str, StringConstraints(max_length=4096)], Field(union_mode="left_to_right")]


class Prediction(Strict):
    """Text that the answer is expected to repeat. Only a hint about speed, which the text never depends on."""

    type: Literal["content"]
    content: Content


class ChatRequest(FormatFields):
    unbuilt: ClassVar[Mapping[str, Callable[[Any], bool]]] = {**UNBUILT, **_UNBUILT_CHAT}
    prompt_param: ClassVar[str] = "messages"

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: NumTop | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS, fail_fast=True, default_factory=list)]
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    functions: Annotated[list[FunctionDefinition], Field(max_length=MAX_TOOLS, fail_fast=True, default_factory=list)]
    function_call: FunctionCall | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: Annotated[
        dict[str, Scalar], Field(max_length=MAX_TEMPLATE_KWARGS, default_factory=dict), bounded(MAX_TEMPLATE_KWARGS)
    ]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    echo: bool = False
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1, max_length=2, default_factory=lambda: ["text"])]
    # Accepted, of no effect on the text here.
    prediction: Prediction | None = None
    verbosity: Verbosity | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: ServiceTier | None = None
    safety_identifier: Word | None = None
    prompt_cache_key: Word | None = None
    prompt_cache_retention: CacheRetention | None = None
    prompt_cache_options: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _few_parts(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) <= MAX_MESSAGES:
            contents = (message.get("content") for message in value if isinstance(message, dict))
            num_parts = sum(len(content) for content in contents if isinstance(content, list))
            if num_parts > MAX_TOTAL_PARTS:
                raise ValueError(f"must have at most {MAX_TOTAL_PARTS} content parts together, not {num_parts}")
        return value

    def check(self) -> None:
        super().check()
        for index, message in enumerate(self.messages):
            message.check_role(f"messages[{index}]")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
        self._check_continued()
        self._check_tools()

    def _check_continued(self) -> None:
        last = self.messages[-1]
        given = self.continue_final_message, "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt
        if all(given):
            raise RequestError("continue_final_message and add_generation_prompt can't both be true", param="continue_final_message")
        if self.continues and (last.role != "assistant" or last.content is None):
            raise RequestError(
                "only a last message of role assistant with content can be continued",
                param="continue_final_message" if self.continue_final_message else f"messages[{len(self.messages) - 1}].prefix",
            )
        for index, message in enumerate(self.messages[:-1]):
            if message.prefix:
                raise RequestError("only the last message can be a prefix", param=f"messages[{index}].prefix")

    def _check_tools(self) -> None:
        if self.functions and self.tools:
            raise RequestError("functions can't be combined with tools", param="functions")
        if self.function_call is not None and self.tool_choice is not None:
            raise RequestError("function_call can't be combined with tool_choice", param="function_call")
        offered = self.offered
        if offered is not None and offered.mode == "required" and self.constraint is not None:
            param = self.constraint[2]
            raise RequestError(f"{param} can't be combined with a tool_choice that demands a call", param=param)

    @property
    def wants_pictures(self) -> bool:
        """May the answer have some?"""
        return "image" in self.modalities

    @property
    def needs_pictures(self) -> bool:
        """Does it take a model that knows pictures?"""
        return self.wants_pictures or bool(self.pictures)

    @cached_property
    def pictures(self) -> dict[str, str]:
        """URLs of all pictures by their fields, in order."""
        return {place: url for index, message in enumerate(self.messages) for place, url in message.pictures(f"messages[{index}]").items()}

    @property
    def continues(self) -> bool:
        """Is the last message open, so that the answer goes on with it?"""
        return self.continue_final_message or self.messages[-1].prefix

    @property
    def is_legacy(self) -> bool:
        """Does the client expect `function_call` instead of `tool_calls`?"""
        return bool(self.functions)

    @cached_property
    def offered(self) -> ToolSet | None:
        """The tools of the request in either form; None when nothing may be called. Raises: RequestError."""
        if self.functions or self.function_call is not None:
            return self._offered_functions()
        return tool_set(self.tools, self.tool_choice, self.parallel_tool_calls)

    def _offered_functions(self) -> ToolSet | None:
        tools = [FunctionTool(type="function", function=function) for function in self.functions]
        choice: Any = self.function_call
        if isinstance(choice, NamedOnly):
            choice = NamedFunction(type="function", function=choice)
        try:
            return tool_set(tools, choice, False)
        except RequestError as error:
            param = "function_call" if (error.param or "").startswith("tool_choice") else "functions"
            message = error.message.replace("tool_choice", "function_call").replace("tools", "functions")
            raise RequestError(message, param=param, code=error.code) from None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wanted_param(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens is not None else "max_tokens"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
