"""What the routes that read texts and write none take: embeddings, rerank, score, classify.

No HTTP, no engine. `body` reads requests into these; `embeddings`, `rerank` and `classify` turn them into work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, field_validator

from service.api.schema import INT32, MAX_MESSAGES, Ids, NonEmpty, Priority, Strict, Timeout, Word, prompt_kind
from service.api.schema_chat import Message
from service.errors import RequestError

MAX_INPUTS = 2048
MAX_DOCUMENTS = 1024
MAX_LABELS = 256
MAX_CLASSIFIED = 128
MAX_SCORED_LABELS = 4096
DEFAULT_INSTRUCTION = "Classify the text that the user gives. Answer with one of these labels and with nothing else: {labels}."
DEFAULT_TEMPLATE = "{input}"

Input = Annotated[
    Annotated[NonEmpty, Tag("text")]
    | Annotated[list[NonEmpty], Field(max_length=MAX_INPUTS, fail_fast=True), Tag("texts")]
    | Annotated[Ids, Tag("ids")]
    | Annotated[list[Ids], Field(max_length=MAX_INPUTS, fail_fast=True), Tag("id_lists")],
    Discriminator(
        prompt_kind,
        custom_error_type="input_type",
        custom_error_message="input must be a string, a list of strings, a list of token ids, or a list of such lists, and not empty",
    ),
]


class ReadingFields(Strict):
    """What all of them take. truncate_prompt_tokens: each text's first so many tokens are read, -1 for as many as the model takes."""

    model: Word | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT32)] | None = None
    user: Word | None = None
    priority: Priority = 0
    timeout: Timeout | None = None
    cache_salt: Word | None = None

    def check(self) -> None:
        if self.truncate_prompt_tokens == 0:
            raise RequestError(
                "truncate_prompt_tokens must be a number of tokens, or -1 for as many as the model takes", param="truncate_prompt_tokens"
            )


class VectorFields(ReadingFields):
    """pooling: how the tokens' vectors become the text's; the model's own way unless said."""

    pooling: Literal["last", "mean", "cls"] | None = None


class EmbeddingRequest(VectorFields):
    input: Input
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=INT32)] | None = None

    @property
    def inputs(self) -> Sequence[str | list[int]]:
        """Each input by itself: texts, or lists of ids."""
        given: Any = self.input
        return given if isinstance(given, list) and not isinstance(given[0], int) else [given]


class Document(Strict):
    text: NonEmpty


class RerankRequest(VectorFields):
    """documents: texts, or objects with a text. return_documents: None leaves it to the route's dialect."""

    query: NonEmpty
    documents: Annotated[list[Document], Field(min_length=1, max_length=MAX_DOCUMENTS, fail_fast=True)]
    top_n: Annotated[int, Field(ge=1, le=INT32)] | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Annotated[int, Field(ge=1, le=INT32)] | None = None

    @field_validator("documents", mode="before")
    @classmethod
    def _as_objects(cls, value: Any) -> Any:
        return [{"text": each} if isinstance(each, str) else each for each in value] if isinstance(value, list) else value


Texts = Annotated[list[NonEmpty], Field(min_length=1, max_length=MAX_DOCUMENTS, fail_fast=True)]


class ScoreRequest(VectorFields):
    """Two sides under one of four pairs of names; see `sides`."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None

    @field_validator("text_1", "text_2", "queries", "documents", "items", "data_1", "data_2", mode="before")
    @classmethod
    def _one_text(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def check(self) -> None:
        super().check()
        (left, lefts), (right, rights) = self.sides
        if len(lefts) not in (1, len(rights)):
            raise RequestError(
                f"{left} has {len(lefts)} texts and {right} {len(rights)}; {left} must have one text, or as many as {right}", param=left
            )

    @property
    def sides(self) -> tuple[tuple[str, list[str]], tuple[str, list[str]]]:
        """(field, texts) of each side. Raises: RequestError unless exactly one pair of names is used."""
        given = [name for name in _SIDES if getattr(self, name) is not None]
        for left, right in _PAIRS:
            if set(given) == {left, right}:
                return (left, getattr(self, left)), (right, getattr(self, right))
        pairs = ", ".join(f"{left} and {right}" for left, right in _PAIRS)
        missing = next((name for pair in _PAIRS for name in pair if set(given) == set(pair) - {name}), None if given else "text_1")
        code = None if missing is None else "missing_required_parameter"
        raise RequestError(f"two sides are required, under one of these pairs of names: {pairs}", param=missing or given[-1], code=code)


_PAIRS = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
_SIDES = tuple(dict.fromkeys(name for pair in _PAIRS for name in pair))

Label = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class ClassifyRequest(ReadingFields):
    """input, or the messages of one conversation. instruction and template: the words around the text, with {labels} and {input} for
    what is put in. normalize: what a label's log-probability is compared by; see docs/embeddings.md."""

    input: Annotated[list[NonEmpty], Field(min_length=1, max_length=MAX_CLASSIFIED, fail_fast=True)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    labels: Annotated[list[Label], Field(min_length=2, max_length=MAX_LABELS, fail_fast=True)]
    instruction: Annotated[str, StringConstraints(max_length=65_536)] | None = None
    template: Annotated[str, StringConstraints(max_length=65_536)] | None = None
    normalize: Literal["none", "length", "prior"] = "none"

    @field_validator("input", mode="before")
    @classmethod
    def _one_input(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def check(self) -> None:
        super().check()
        if (self.input is None) == (self.messages is None):
            is_missing = self.input is None
            raise RequestError(
                "input or messages is required" if is_missing else "give input or messages, not both",
                param="input" if is_missing else "messages",
                code="missing_required_parameter" if is_missing else None,
            )
        if len(set(self.labels)) < len(self.labels):
            double = next(label for index, label in enumerate(self.labels) if label in self.labels[:index])
            raise RequestError(f"labels has {double[:64]!r} twice", param="labels")
        if self.template is not None and "{input}" not in self.template:
            raise RequestError("template must say where the text goes, with {input}", param="template")
        if self.template is not None and self.messages is not None:
            raise RequestError("template is only allowed with input", param="template")
        if len(self.input or [""]) * len(self.labels) > MAX_SCORED_LABELS:
            raise RequestError(f"the number of inputs times that of labels must be at most {MAX_SCORED_LABELS}", param="input")
