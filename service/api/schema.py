"""What the routes' schemas are made of: strict pydantic models, bounded types, the sampling fields that the text routes share, and the
fields we know but do not build.

No HTTP, no engine. An explicit null is an absent field. A route's own schema stands in `schema_chat`, `schema_completion` or beside
its route; `body` reads requests into them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, field_validator, model_validator

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
MAX_FIELDS = 1024
INT32 = 2**31 - 1
# Marks of prompt caches that have to be told where to cut. Ours does not, and clients put them everywhere.
WITHOUT_EFFECT = frozenset({"cache_control"})

# A bound also makes pydantic refuse half a surrogate pair, which a plain str lets pass.
Text = Annotated[str, StringConstraints(max_length=MAX_CHARS)]
Word = Annotated[str, StringConstraints(max_length=512)]
Count = Annotated[int, Field(ge=1, le=INT32)]
TokenId = Annotated[int, Field(ge=0, le=INT32)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
NonEmpty = Annotated[str, StringConstraints(min_length=1, max_length=MAX_CHARS)]
Ids = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def type_of(data: Any) -> str | None:
    """The field `type`, by which unions tell parts, items and tools apart."""
    kind = data.get("type") if isinstance(data, dict) else getattr(data, "type", None)
    return kind if isinstance(kind, str) else None


def content_kind(content: Any) -> str | None:
    """The same for content that is a text or a list of parts."""
    return "text" if isinstance(content, str) else "parts" if isinstance(content, list) else None


def prompt_kind(prompt: Any) -> str | None:
    """The same for one or many texts or lists of ids."""
    if isinstance(prompt, str):
        return "text"
    if not isinstance(prompt, list) or not prompt:
        return None
    first = prompt[0]
    return "texts" if isinstance(first, str) else "id_lists" if isinstance(first, list) else "ids"


def bounded(most: int) -> BeforeValidator:
    """Counts an object's entries before pydantic looks at each of them, and makes an error of each: it has no fail_fast for these."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"must have at most {most} entries, not {len(value)}")
        return value

    return BeforeValidator(check)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# Fields that several routes take.
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=-1, le=INT32)]
MinP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)]
NumTop = Annotated[int, Field(ge=0, le=20)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Stops = Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True), BeforeValidator(_listed)]
StopIds = Annotated[list[TokenId], Field(max_length=128, fail_fast=True)]
MinTokens = Annotated[int, Field(ge=0, le=INT32)]
Priority = Annotated[int, Field(ge=-INT32, le=INT32)]
Timeout = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Metadata = Annotated[dict[str, Word], Field(max_length=MAX_METADATA), bounded(MAX_METADATA)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Verbosity = Literal["low", "medium", "high"]
ServiceTier = Literal["auto", "default", "flex", "scale", "priority", "fast"]
CacheRetention = Literal["in_memory", "in-memory", "24h"]


class Strict(BaseModel):
    """No conversions, nulls dropped, unknown fields kept aside for `unknown_fields`."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, protected_namespaces=())
    # Fields that this server knows and does not build: 400 unless the value asks for nothing, which the function tells.
    unbuilt: ClassVar[Mapping[str, Callable[[Any], bool]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            raise ValueError(f"must have at most {MAX_FIELDS} fields, not {len(data)}")
        return {key: value for key, value in data.items() if value is not None}

    def unknown_fields(self) -> Iterator[str]:
        """Also of what it holds, as `messages[1].content[0].colour`."""
        yield from (name for name in self.model_extra or () if name not in WITHOUT_EFFECT)
        for name, value in self.__dict__.items():
            if isinstance(value, Strict):
                yield from _below(type(self).model_fields[name].alias or name, value)
            elif isinstance(value, list) and value and isinstance(value[0], Strict):
                for index, part in enumerate(value):
                    yield from _below(f"{name}[{index}]", part)

    def check(self) -> None:
        """What no single field can tell. Raises: RequestError."""


def _below(path: str, part: Strict) -> Iterator[str]:
    return (f"{path}.{name}" for name in part.unknown_fields())


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


def is_empty(value: Any) -> bool:
    return value in ([], {}, "")


def never(value: Any) -> bool:
    return False


def equals(wanted: Any) -> Callable[[Any], bool]:
    return lambda value: type(value) is type(wanted) and value == wanted


# Fields that change what comes out, and that we do not build: 400 rather than silence, unless the value asks for nothing.
UNBUILT: dict[str, Callable[[Any], bool]] = {
    "add_special_tokens": never,
    "allowed_token_ids": never,
    "bad_words": is_empty,
    "guided_whitespace_pattern": never,
    "length_penalty": equals(1),
    "logits_processors": is_empty,
    "lora_path": never,
    "prompt_embeds": never,
    "return_tokens_as_token_ids": equals(False),
    "structural_tag": never,
    "truncate_prompt_tokens": never,
    "use_beam_search": equals(False),
}


class SamplingFields(Strict):
    """What both text routes share. Absent sampling numbers come from the model's own defaults."""

    unbuilt: ClassVar[Mapping[str, Callable[[Any], bool]]] = UNBUILT
    # Where the client leaves max_tokens open; None is all that the context has room for.
    default_tokens: ClassVar[int | None] = None
    prompt_param: ClassVar[str] = "prompt"

    model: Word | None = None
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: RepetitionPenalty | None = None
    seed: Seed | None = None
    stop: Stops = []
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES), bounded(MAX_BIASES)] = {}
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    ignore_eos: bool = False
    min_tokens: MinTokens = 0
    stop_token_ids: StopIds = []
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    prompt_logprobs: NumTop | None = None
    return_token_ids: bool = False
    user: Word | None = None
    priority: Priority = 0
    timeout: Timeout | None = None
    cache_salt: Word | None = None

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
        if self.best_of is not None:
            self._check_best_of(self.best_of)
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs is only allowed when stream is false", param="prompt_logprobs")
        if self.seed is not None and self.seed + self.num_drawn > 2**63:
            raise RequestError("seed + n must be at most 2**63", param="seed")
        if self.wanted_tokens is not None and self.min_tokens > self.wanted_tokens:
            raise RequestError("min_tokens must be at most max_tokens", param="min_tokens")

    def _check_best_of(self, best_of: int) -> None:
        if best_of < self.n:
            raise RequestError(f"best_of must be at least n, which is {self.n}", param="best_of")
        if best_of > self.n and self.stream:
            raise RequestError(
                "best_of greater than n is only allowed when stream is false: the best are known at the end", param="best_of"
            )

    @property
    def num_drawn(self) -> int:
        """How many choices are generated for each prompt; the best n of them are the answer."""
        return self.best_of or self.n

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
