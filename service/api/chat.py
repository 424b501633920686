"""POST /v1/chat/completions: the request's road through the server, and the form of its answer.

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
from service.api.dialogue import converse
from service.api.logprobs import chat_entries
from service.api.routes import answer, caller_of, fingerprint
from service.api.schema_chat import ChatRequest
from service.api.shape import Shape, Tokens
from service.codec.tokenizer import Tokenizer


def chat_route(backend: Backend, limits: BodyLimits) -> Any:
    """The endpoint. Raises, when called: RequestError and its kinds, OverloadedError, UnavailableError, DeadlineError."""

    async def create_chat_completion(request: Request) -> Response:
        wanted, warnings = await parse(request, ChatRequest, limits)
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        dialogue = await converse(backend, wanted, caller_of(request), request_id)
        model, generation = dialogue.model, dialogue.generation
        head = {"id": request_id, "created": int(time.time()), "model": model, "system_fingerprint": fingerprint(backend, model)}
        form = ChatForm(dialogue.codec.tokenizer)
        warnings = [*warnings, *dialogue.warnings]
        shape = Shape(head, generation, form, has_logprobs=wanted.logprobs, options=wanted.stream_options, warnings=warnings)
        return answer(wanted, generation, shape, warnings)

    return create_chat_completion


class ChatForm:
    """Text in a message, or in deltas of which the first has the role."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    before_text = b'"delta":{"content":'
    after_text = b"}"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, choice: int, tokens: Tokens) -> dict[str, Any]:
        return {"content": chat_entries(self._tokenizer, tokens), "refusal": None}
