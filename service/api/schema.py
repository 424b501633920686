"""What clients may send: strict pydantic models, one per route, with every bound. And the fields we know but do not build yet.

No HTTP, no engine. Longer than most files because every field of both routes, with its bounds, is read in one place. An explicit null
is an absent field. `body` reads requests into these; `generation` turns them into work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, field_validator, model_validator

from service.engine.messages import MAX_CHOICES
from service.errors import RequestError

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_PROMPTS = 128
MAX_STOPS = 64
MAX_IDS = 2**20
MAX_CHARS = 2**28
MAX_BIASES = 4096
MAX_METADATA = 64
_INT32 = 2**31 - 1

# A bound also makes pydantic refuse half a surrogate pair, which a plain str lets pass.
Text = Annotated[str, StringConstraints(max_length=MAX_CHARS)]
Word = Annotated[str, StringConstraints(max_length=512)]
Count = Annotated[int, Field(ge=1, le=_INT32)]
TokenId = Annotated[int, Field(ge=0, le=_INT32)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Strict(BaseModel):
    """No conversions, nulls dropped, unknown fields kept aside for `unknown_fields`."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    def unknown_fields(self) -> list[str]:
        return list(self.model_extra or ())


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


def _bounded(value: Any, most: int) -> Any:
    """Counts an object's entries before pydantic looks at each of them, and makes an error of each: it has no fail_fast for these."""
    if isinstance(value, dict) and len(value) > most:
        raise ValueError(f"must have at most {most} entries, not {len(value)}")
    return value


def _is_empty(value: Any) -> bool:
    return value in ([], {}, "")


def _never(value: Any) -> bool:
    return False


def _equals(wanted: Any) -> Callable[[Any], bool]:
    return lambda value: type(value) is type(wanted) and value == wanted


# Fields that change what comes out, and that we do not build: 400 rather than silence, unless the value asks for nothing.
_UNBUILT: dict[str, Callable[[Any], bool]] = {
    "add_special_tokens": _never,
    "allowed_token_ids": _never,
    "bad_words": _is_empty,
    "ebnf": _never,
    "grammar": _never,
    "guided_choice": _never,
    "guided_grammar": _never,
    "guided_json": _never,
    "guided_regex": _never,
    "json_schema": _never,
    "length_penalty": lambda value: value == 1,
    "logits_processors": _is_empty,
    "lora_path": _never,
    "prompt_embeds": _never,
    "prompt_logprobs": _never,
    "regex": _never,
    "return_token_ids": _equals(False),
    "return_tokens_as_token_ids": _equals(False),
    "skip_special_tokens": _equals(True),
    "structured_outputs": _never,
    "truncate_prompt_tokens": _never,
    "use_beam_search": _equals(False),
}
_UNBUILT_CHAT: dict[str, Callable[[Any], bool]] = {
    "add_generation_prompt": _equals(True),
    "audio": _never,
    "chat_template": _never,
    "chat_template_kwargs": _is_empty,
    "continue_final_message": _equals(False),
    "documents": _is_empty,
    "echo": _equals(False),
    "function_call": _equals("none"),
    "functions": _is_empty,
    "mm_processor_kwargs": _is_empty,
    "modalities": _equals(["text"]),
    "thinking_token_budget": _never,
    "tool_choice": _equals("none"),
    "tools": _is_empty,
}
_UNBUILT_COMPLETION: dict[str, Callable[[Any], bool]] = {
    "echo": _equals(False),
    "suffix": _is_empty,
}


class SamplingFields(Strict):
    """What both text routes share. Absent sampling numbers come from the model's own defaults."""

    unbuilt: ClassVar[Mapping[str, Callable[[Any], bool]]] = _UNBUILT
    # Where the client leaves max_tokens open; None is all that the context has room for.
    default_tokens: ClassVar[int | None] = None
    prompt_param: ClassVar[str] = "prompt"

    model: Word | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] = []
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]], Field(max_length=MAX_BIASES)] = {}
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, le=_INT32)] = 0
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128, fail_fast=True)] = []
    include_stop_str_in_output: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Word | None = None
    priority: Annotated[int, Field(ge=-_INT32, le=_INT32)] = 0
    timeout: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = None
    cache_salt: Word | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few_biases(cls, value: Any) -> Any:
        return _bounded(value, MAX_BIASES)

    @field_validator("logit_bias", mode="after")
    @classmethod
    def _whole_keys(cls, value: dict[str, float]) -> dict[str, float]:
        if not all(re.fullmatch(r"[0-9]{1,10}", key) for key in value):
            raise ValueError("keys must be token ids, written as whole numbers")
        return value

    def check(self) -> None:
        """What no single field can tell. Raises: RequestError."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
        if self.best_of is not None and self.best_of != self.n:
            raise RequestError("best_of other than n is not supported", param="best_of", code="unsupported_parameter")
        if self.seed is not None and self.seed + self.n > 2**63:
            raise RequestError("seed + n must be at most 2**63", param="seed")
        if self.wanted_tokens is not None and self.min_tokens > self.wanted_tokens:
            raise RequestError("min_tokens must be at most max_tokens", param="min_tokens")

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens per choice; None when the client leaves it open."""
        return self.max_tokens

    @property
    def wanted_param(self) -> str:
        """The field that says so."""
        return "max_tokens"

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives per token; None for no logprobs."""
        raise NotImplementedError


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

    def check(self, param: str) -> None:
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
    unbuilt: ClassVar[Mapping[str, Callable[[Any], bool]]] = {**_UNBUILT, **_UNBUILT_CHAT}
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
        return _bounded(value, MAX_METADATA)

    def check(self) -> None:
        super().check()
        for index, message in enumerate(self.messages):
            message.check(f"messages[{index}]")
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


Ids = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)]


def _prompt_kind(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return "text"
    if not isinstance(prompt, list) or not prompt:
        return None
    first = prompt[0]
    return "texts" if isinstance(first, str) else "id_lists" if isinstance(first, list) else "ids"


Prompt = Annotated[
    Annotated[str, StringConstraints(min_length=1, max_length=MAX_CHARS), Tag("text")]
    | Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=MAX_CHARS)]],
        Field(max_length=MAX_PROMPTS, fail_fast=True),
        Tag("texts"),
    ]
    | Annotated[Ids, Tag("ids")]
    | Annotated[list[Ids], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("id_lists")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="prompt must be a string, a list of strings, a list of token ids, or a list of such lists, and not empty",
    ),
]


class CompletionRequest(SamplingFields):
    unbuilt: ClassVar[Mapping[str, Callable[[Any], bool]]] = {**_UNBUILT, **_UNBUILT_COMPLETION}
    default_tokens: ClassVar[int | None] = 16

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def check(self) -> None:
        super().check()
        if self.n * len(self.prompts) > MAX_CHOICES:
            raise RequestError(f"n times the number of prompts must be at most {MAX_CHOICES}", param="n")

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt by itself: texts, or lists of ids."""
        prompt: Any = self.prompt
        return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs
