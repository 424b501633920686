"""POST /v1/completions: raw prompts as texts or ids, one or many, and the form of their answer.

No sampling, no tokens of the engine: those are in `backend` and `generation`.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from service.api.backend import Backend
from service.api.body import BodyLimits, parse
from service.api.logprobs import CompletionLogprobs
from service.api.routes import answer, caller_of, fingerprint
from service.api.schema_completion import CompletionRequest
from service.api.shape import Shape, Tokens
from service.codec.prompt import Codec
from service.codec.tokenizer import Tokenizer
from service.errors import RequestError


def completion_route(backend: Backend, limits: BodyLimits) -> Any:
    """The endpoint. Raises, when called: RequestError and its kinds, OverloadedError, UnavailableError, DeadlineError."""

    async def create_completion(request: Request) -> Response:
        wanted, warnings = await parse(request, CompletionRequest, limits)
        model = backend.choose(wanted.model)
        codec = backend.codecs[model]
        given = wanted.prompts
        prompts = await backend.encode(model, lambda: [_ids(codec, prompt) for prompt in given], sum(map(len, given)))
        request_id = f"cmpl-{uuid.uuid4().hex}"
        generation = backend.submit(request_id, model, prompts, wanted, caller_of(request))
        head = {"id": request_id, "created": int(time.time()), "model": model, "system_fingerprint": fingerprint(backend, model)}
        has_logprobs = wanted.logprobs is not None
        form = CompletionForm(codec.tokenizer, len(generation.choices), bool(wanted.logprobs))
        shape = Shape(head, generation, form, has_logprobs=has_logprobs, options=wanted.stream_options, warnings=warnings)
        return answer(wanted, generation, shape, warnings)

    return create_completion


def _ids(codec: Codec, prompt: str | list[int]) -> list[int]:
    """Raises: RequestError for an id outside the vocabulary, and for a text without any token."""
    if not isinstance(prompt, str):
        codec.check_ids(prompt)
        return prompt
    ids = codec.encode_text(prompt)
    if not ids:
        raise RequestError("prompt has no token", param="prompt")
    return ids


class CompletionForm:
    """Bare text, whole or in pieces."""

    whole_object = chunk_object = "text_completion"
    before_text = b'"text":'
    after_text = b""

    def __init__(self, tokenizer: Tokenizer, num_choices: int, has_top: bool) -> None:
        self._logprobs = [CompletionLogprobs(tokenizer, has_top) for _ in range(num_choices)]

    def opening(self) -> None:
        return None

    def delta(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}

    def message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def logprobs(self, choice: int, tokens: Tokens) -> dict[str, Any]:
        return self._logprobs[choice].lists(tokens)
