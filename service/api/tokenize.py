"""POST /tokenize, /detokenize and /apply-template (also under /v1): a model's prompts as ids, and back, in vLLM's and llama-server's forms.

Nothing runs in the engine. The prompts are made by the same functions as those that are sent to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from service.api.backend import Backend, context_of
from service.api.body import BodyLimits, parse, read, validate
from service.api.dialogue import choose_for, encode_prompt
from service.api.routes import json_answer
from service.api.schema import MAX_IDS, MAX_MESSAGES, Strict, Text, TokenId, Word
from service.api.schema_chat import ChatRequest
from service.codec.prompt import Codec
from service.errors import RequestError


class TokenizeFields(Strict):
    """add_special_tokens and add_special are one thing, and so are return_token_strs and with_pieces in their two forms of answer."""

    add_special_tokens: bool | None = None
    add_special: bool | None = None
    parse_special: bool = True
    return_token_strs: bool = False
    with_pieces: bool = False


class TokenizeRequest(TokenizeFields):
    """One of prompt, content and messages. With messages the body may have every field of a chat request besides."""

    model: Word | None = None
    prompt: Text | None = None
    content: Text | None = None
    messages: Annotated[list[Any], Field(max_length=MAX_MESSAGES)] | None = None

    def check(self) -> None:
        given = [name for name in ("prompt", "content", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"{' and '.join(given)} can't be combined" if given else "prompt is required"
            raise RequestError(
                f"{what}: give one of prompt, content and messages", param=given[1] if given else "prompt", code="invalid_value"
            )

    @property
    def adds_special(self) -> bool:
        """vLLM's form adds the ids around a text unless told otherwise, llama-server's adds them when told so."""
        wanted = self.add_special_tokens if self.add_special_tokens is not None else self.add_special
        return self.content is None if wanted is None else wanted


class TokenizeChatRequest(ChatRequest, TokenizeFields):
    unbuilt: ClassVar[Mapping[str, Callable[[Any], bool]]] = {
        name: is_neutral for name, is_neutral in ChatRequest.unbuilt.items() if name not in TokenizeFields.model_fields
    }


class DetokenizeRequest(Strict):
    """skip_special_tokens: leaves out what has no text of its own; without it the text spells them, so that it has the same ids again."""

    model: Word | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_IDS, fail_fast=True)]
    skip_special_tokens: bool = False


def tokenize_router(backend: Backend, limits: BodyLimits) -> APIRouter:
    """Raises, when called: RequestError and its kinds, OverloadedError, UnavailableError, DeadlineError."""
    router = APIRouter(redirect_slashes=False)

    async def tokenize(request: Request) -> Response:
        body = await read(request, limits)
        wanted, warnings = validate(body, TokenizeRequest)
        if wanted.messages is not None:
            chat, warnings = validate(body, TokenizeChatRequest, limits.is_strict)
            model = choose_for(backend, chat)
            ids = await encode_prompt(backend, model, chat)
        else:
            _, warnings = validate(body, TokenizeRequest, limits.is_strict)
            model = backend.choose(wanted.model)
            ids = await _encode(backend, model, wanted)
        codec = backend.codecs[model]
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": context_of(backend.info(model)), "tokens": ids}
        if wanted.return_token_strs:
            answer["token_strs"] = [_text(codec, token) for token in ids]
        if wanted.with_pieces:
            answer["tokens"] = [{"id": token, "piece": _piece(codec, token)} for token in ids]
        return json_answer(answer, warnings)

    async def detokenize(request: Request) -> Response:
        wanted, warnings = await parse(request, DetokenizeRequest, limits)
        model = backend.choose(wanted.model)
        codec = backend.codecs[model]
        _check_ids(codec, wanted.tokens)
        decode = codec.tokenizer.decode
        text = await backend.encode(model, lambda: decode(wanted.tokens, skip_special=wanted.skip_special_tokens), len(wanted.tokens))
        return json_answer({"prompt": text, "text": text, "content": text}, warnings)

    async def apply_template(request: Request) -> Response:
        wanted, warnings = await parse(request, ChatRequest, limits)
        model = backend.choose(wanted.model, generates=True)
        ids = await encode_prompt(backend, model, wanted)
        prompt = backend.codecs[model].tokenizer.decode(ids, skip_special=False)
        return json_answer({"prompt": prompt}, warnings)

    for path, endpoint in (("tokenize", tokenize), ("detokenize", detokenize), ("apply-template", apply_template)):
        for prefix in ("/", "/v1/"):
            router.add_api_route(f"{prefix}{path}", endpoint, methods=["POST"])
    return router


async def _encode(backend: Backend, model: str, wanted: TokenizeRequest) -> list[int]:
    """Raises: ContextLengthError for what can't be a prompt, OverloadedError."""
    text, param = (wanted.prompt, "prompt") if wanted.prompt is not None else (wanted.content or "", "content")
    backend.check_chars(model, len(text), param)
    codec = backend.codecs[model]

    def work() -> list[int]:
        if not wanted.adds_special:
            return codec.tokenizer.encode(text, allow_special=wanted.parse_special)
        is_encoder = codec.tokenizer.ends.closing_id is not None
        return codec.encode_text(text) if wanted.parse_special and not is_encoder else codec.encode_document(text)

    return await backend.encode(model, work, len(text))


def _check_ids(codec: Codec, ids: Sequence[int]) -> None:
    """Raises: RequestError naming the first id that is not in the vocabulary."""
    for index, token in enumerate(ids):
        if token >= codec.vocab_size:
            message = f"tokens[{index}] is {token}; the vocabulary has ids 0 to {codec.vocab_size - 1}"
            raise RequestError(message, param=f"tokens[{index}]")


def _text(codec: Codec, token: int) -> str:
    return codec.tokenizer.token_bytes(token, skip_special=False).decode("utf-8", "replace")


def _piece(codec: Codec, token: int) -> str | list[int]:
    """A text, or bytes where the token holds only part of a character."""
    data = codec.tokenizer.token_bytes(token, skip_special=False)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return list(data)
