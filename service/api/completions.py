"""POST /v1/completions: raw prompts as texts or ids, one or many, and the form of their answer.

No sampling, no tokens of the engine: those are in `backend` and `generation`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from service.api.backend import Backend, Terms
from service.api.body import BodyLimits, parse
from service.api.choice import Echo, Piece, Reply
from service.api.constraint import rule_of
from service.api.generation import Generation
from service.api.logprobs import CompletionLogprobs, prompt_entries
from service.api.routes import answer, caller_of, fingerprint
from service.api.schema_completion import CompletionRequest
from service.api.shape import Shape, Tokens
from service.codec.grammar import grammar
from service.codec.infill import infill_of
from service.codec.prompt import Codec
from service.codec.tokenizer import Tokenizer
from service.errors import RequestError
from service.scheduling.reading import Read


def completion_route(backend: Backend, limits: BodyLimits) -> Any:
    """The endpoint. Raises, when called: RequestError and its kinds, OverloadedError, UnavailableError, DeadlineError."""

    async def create_completion(request: Request) -> Response:
        wanted, warnings = await parse(request, CompletionRequest, limits)
        model = backend.choose(wanted.model, generates=True)
        codec = backend.codecs[model]
        num_chars = _check_size(backend, model, wanted)
        prompts, terms = await backend.encode(model, lambda: _prepare(codec, wanted), num_chars)
        request_id = f"cmpl-{uuid.uuid4().hex}"
        generation = backend.submit(request_id, model, [prompt.ids for prompt in prompts], wanted, caller_of(request), terms)
        head = {"id": request_id, "created": int(time.time()), "model": model, "system_fingerprint": fingerprint(backend, model)}
        form = CompletionForm(codec.tokenizer, wanted, generation, [prompt.num_hidden for prompt in prompts])
        return answer(wanted, generation, Shape(head, generation, form, wanted, warnings), warnings)

    return create_completion


@dataclass(frozen=True, slots=True)
class _Prompt:
    """text: as an echo shows it. num_hidden: characters of the ids' text that it does not show, at its start."""

    ids: list[int]
    text: str
    num_hidden: int


def _check_size(backend: Backend, model: str, wanted: CompletionRequest) -> int:
    """How many characters or ids there are to work on. Raises: ContextLengthError for a text that can't fit."""
    for prompt, name in zip(wanted.prompts, _names(wanted), strict=True):
        if isinstance(prompt, str):
            backend.check_chars(model, len(prompt) + len(wanted.suffix or ""), name)
    return sum(map(len, wanted.prompts)) + len(wanted.suffix or "")


def _names(wanted: CompletionRequest) -> list[str]:
    """How errors call each prompt."""
    return [f"prompt[{index}]" if wanted.prompts is wanted.prompt else "prompt" for index in range(len(wanted.prompts))]


def _prepare(codec: Codec, wanted: CompletionRequest) -> tuple[list[_Prompt], Terms]:
    """Raises: RequestError."""
    given: Sequence[str | list[int]] = wanted.prompts
    prompts = [_prompt(codec, prompt, wanted.suffix or "", name) for prompt, name in zip(given, _names(wanted), strict=True)]
    rule = rule_of(wanted)
    has_logprobs = wanted.echo and wanted.logprobs is not None
    terms = Terms(
        grammar(rule) if rule else "",
        wanted.constraint[2] if wanted.constraint else None,
        reads=[_read(wanted, len(prompt.ids)) for prompt in prompts],
        reply=Reply(shown=frozenset() if wanted.skip_special_tokens else codec.tokenizer.special.ids),
        echoes=[Echo(prompt.text, prompt.ids if has_logprobs else ()) for prompt in prompts] if wanted.echo else (),
    )
    return prompts, terms


def _prompt(codec: Codec, prompt: str | list[int], suffix: str, param: str) -> _Prompt:
    """Raises: RequestError for an id outside the vocabulary, for a text without any token, and for a suffix that the model can't take."""
    try:
        if not isinstance(prompt, str):
            codec.check_ids(prompt)
            return _Prompt(prompt, codec.tokenizer.decode(prompt, skip_special=False), 0)
        if suffix:
            return _Prompt(_infilled(codec, prompt, suffix), prompt, 0)
        ids = codec.encode_text(prompt)
    except RequestError as error:
        raise RequestError(error.message, param=param if error.param == "prompt" else error.param, code=error.code) from None
    if not ids:
        raise RequestError("prompt has no token", param=param)
    return _Prompt(ids, prompt, _num_hidden(codec.tokenizer, ids, prompt))


def _infilled(codec: Codec, prefix: str, suffix: str) -> list[int]:
    marks = infill_of(codec.tokenizer)
    if marks is None:
        message = f"suffix is not supported: the model {codec.name} has no tokens to fill in the middle"
        raise RequestError(message, param="suffix", code="unsupported_parameter")
    return marks.encode(codec.tokenizer, prefix, suffix)


def _num_hidden(tokenizer: Tokenizer, ids: list[int], prompt: str) -> int:
    """The length of a beginning of sequence that the text itself does not spell."""
    if not tokenizer.ends.add_bos or ids[0] != tokenizer.ends.bos_id:
        return 0
    first = tokenizer.token_bytes(ids[0], skip_special=False).decode("utf-8", "replace")
    return 0 if prompt.startswith(first) else len(first)


def _read(wanted: CompletionRequest, prompt_len: int) -> Read | None:
    """What has to be known of a prompt. Where nothing is to be generated, a prompt that is only repeated is read from its end on."""
    asked = [wanted.prompt_logprobs, wanted.logprobs if wanted.echo else None]
    if any(each is not None for each in asked):
        return Read(first=1, num_top=max(each or 0 for each in asked))
    return Read(first=prompt_len) if wanted.max_tokens == 0 else None


class CompletionForm:
    """Bare text, whole or in pieces."""

    whole_object = chunk_object = "text_completion"
    before_text = b'"text":'
    after_text = b""
    usage_details: Mapping[str, int] = {}

    def __init__(self, tokenizer: Tokenizer, wanted: CompletionRequest, generation: Generation, num_hidden: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._wanted = wanted
        self._generation = generation
        self._logprobs = []
        for choice in generation.choices:
            prompt = choice.index // generation.num_per_prompt
            num_echoed = len(generation.prompts[prompt]) if wanted.echo else 0
            self._logprobs.append(
                CompletionLogprobs(tokenizer, bool(wanted.logprobs), num_echoed, num_hidden[prompt] if wanted.echo else 0)
            )

    def opening(self, choice: int) -> dict[str, Any] | None:
        return {"text": "", **self._about(choice)} if self._wanted.return_token_ids else None

    def about_prompt(self) -> dict[str, Any]:
        return {}

    def _about(self, choice: int) -> dict[str, Any]:
        """What a choice tells of its prompt."""
        prompt = choice // self._generation.num_per_prompt
        ids = self._generation.prompts[prompt]
        told: dict[str, Any] = {"prompt_token_ids": ids} if self._wanted.return_token_ids else {}
        if self._wanted.prompt_logprobs is not None:
            told["prompt_logprobs"] = prompt_entries(self._tokenizer, ids, self._generation.readings[prompt])
        return told

    def delta(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        return [{"text": piece.text}] if piece.text else []

    def message(self, choice: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        return {"text": "".join(piece.text for piece in pieces), **self._about(choice)}

    def finish(self, reason: str) -> str:
        return reason

    def logprobs(self, choice: int, tokens: Tokens) -> dict[str, Any]:
        return self._logprobs[choice].lists(tokens)
