"""What POST /v1/completions takes: raw prompts as texts or ids, one or many.

No HTTP, no engine. `body` reads requests into this; `completions` turns it into work.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from service.api.schema import INT32, MAX_PROMPTS, Ids, NonEmpty, NumTop, Text, prompt_kind
from service.api.schema_format import FormatFields
from service.engine.messages import MAX_CHOICES
from service.errors import RequestError

Prompt = Annotated[
    Annotated[NonEmpty, Tag("text")]
    | Annotated[list[NonEmpty], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("texts")]
    | Annotated[Ids, Tag("ids")]
    | Annotated[list[Ids], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("id_lists")],
    Discriminator(
        prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="prompt must be a string, a list of strings, a list of token ids, or a list of such lists, and not empty",
    ),
]


class CompletionRequest(FormatFields):
    default_tokens: ClassVar[int | None] = 16

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=INT32)] | None = None
    logprobs: NumTop | None = None
    echo: bool = False
    suffix: Text | None = None

    def check(self) -> None:
        super().check()
        if self.num_drawn * len(self.prompts) > MAX_CHOICES:
            name = "n" if self.best_of is None else "best_of"
            raise RequestError(f"{name} times the number of prompts must be at most {MAX_CHOICES}", param=name)
        if self.max_tokens == 0 and not (self.echo or self.prompt_logprobs is not None):
            raise RequestError("max_tokens 0 is only allowed together with echo or prompt_logprobs", param="max_tokens")
        if self.suffix and self.echo:
            raise RequestError("suffix can't be combined with echo", param="suffix")
        if self.suffix and not isinstance(self.prompts[0], str):
            raise RequestError("suffix is only allowed where the prompt is text", param="suffix")

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt by itself: texts, or lists of ids."""
        prompt: Any = self.prompt
        return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs
