"""POST /v1/chat/completions: the request's road through the server, and the form of its answer.

No sampling, no tokens of the engine: those are in `backend` and `generation`.
"""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from service.api.body import BodyLimits, parse
from service.api.choice import Piece
from service.api.dialogue import converse
from service.api.generation import Generation
from service.api.logprobs import chat_entries, prompt_entries
from service.api.routes import answer, caller_of, fingerprint
from service.api.schema_chat import ChatRequest
from service.api.shape import Shape, Tokens
from service.api.studio import Studio
from service.codec.reply import CallDelta
from service.codec.tokenizer import Tokenizer


def chat_route(studio: Studio, limits: BodyLimits) -> Any:
    """The endpoint. Raises, when called: RequestError and its kinds, OverloadedError, UnavailableError, DeadlineError."""

    async def create_chat_completion(request: Request) -> Response:
        wanted, warnings = await parse(request, ChatRequest, limits)
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        dialogue = await converse(studio, wanted, caller_of(request), request_id, warnings)
        model, generation = dialogue.model, dialogue.generation
        head = {
            "id": request_id,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint(studio.easel.backend, model),
        }
        if wanted.service_tier is not None:
            head["service_tier"] = "default"
        form = ChatForm(dialogue.codec.tokenizer, wanted, generation)
        return answer(wanted, generation, Shape(head, generation, form, wanted, warnings), warnings)

    return create_chat_completion


class ChatForm:
    """Text, reasoning and calls in a message, or in deltas of which the first has the role. Reasoning has the two names that clients
    know; a client of the older form gets its one call as function_call."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    before_text = b'"delta":{"content":'
    after_text = b"}"

    def __init__(self, tokenizer: Tokenizer, wanted: ChatRequest, generation: Generation) -> None:
        self.usage_details = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0} if wanted.prediction else {}
        self._tokenizer = tokenizer
        self._wanted = wanted
        self._generation = generation
        self._num_images = [0] * len(generation.choices)

    def opening(self, choice: int) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def about_prompt(self) -> dict[str, Any]:
        told: dict[str, Any] = {"prompt_token_ids": self._generation.prompts[0]} if self._wanted.return_token_ids else {}
        if self._wanted.prompt_logprobs is not None:
            told["prompt_logprobs"] = prompt_entries(self._tokenizer, self._generation.prompts[0], self._generation.readings[0])
        return told

    def delta(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if piece.reasoning:
            found.append({"reasoning_content": piece.reasoning, "reasoning": piece.reasoning})
        if piece.text:
            found.append({"content": piece.text})
        if piece.images:
            found.append({"images": _image_parts(piece.images, self._num_images[piece.choice])})
            self._num_images[piece.choice] += len(piece.images)
        for call in piece.calls:
            found += self._call_deltas(call)
        return [{"delta": each} for each in found]

    def _call_deltas(self, call: CallDelta) -> list[dict[str, Any]]:
        """The head of a call by itself, with an empty text: clients add up whatever comes after it."""
        found: list[dict[str, Any]] = []
        if call.name is not None:
            head = {} if self._wanted.is_legacy else {"id": call.id, "type": call.kind}
            found.append(self._call_delta(call, head, {"name": call.name}, ""))
        if call.arguments:
            found.append(self._call_delta(call, {}, {}, call.arguments))
        return found

    def _call_delta(self, call: CallDelta, head: dict[str, Any], name: dict[str, Any], text: str) -> dict[str, Any]:
        if self._wanted.is_legacy:
            return {"function_call": {**name, "arguments": text}}
        return {"tool_calls": [{"index": call.index, **head, call.kind: {**name, _TEXT_OF[call.kind]: text}}]}

    def message(self, choice: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        reasoning = "".join(piece.reasoning for piece in pieces)
        calls = _joined([call for piece in pieces for call in piece.calls])
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if images := [image for piece in pieces for image in piece.images]:
            message["images"] = _image_parts(images)
        if reasoning:
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if calls and self._wanted.is_legacy:
            message["function_call"] = {"name": calls[0].name, "arguments": calls[0].arguments}
        elif calls:
            message["tool_calls"] = [
                {"id": call.id, "type": call.kind, call.kind: {"name": call.name, _TEXT_OF[call.kind]: call.arguments}} for call in calls
            ]
        return {"message": message}

    def finish(self, reason: str) -> str:
        return "function_call" if reason == "tool_calls" and self._wanted.is_legacy else reason

    def logprobs(self, choice: int, tokens: Tokens) -> dict[str, Any]:
        return {"content": chat_entries(self._tokenizer, tokens), "refusal": None}


# What a kind of call names the text that it is called with.
_TEXT_OF = {"function": "arguments", "custom": "input"}


def _image_parts(images: Sequence[bytes], first: int = 0) -> list[dict[str, Any]]:
    """As OpenRouter's clients know them. first: the number of the first one in its answer."""
    urls = ("data:image/png;base64," + base64.b64encode(image).decode("ascii") for image in images)
    return [{"type": "image_url", "image_url": {"url": url}, "index": index} for index, url in enumerate(urls, first)]


def _joined(deltas: Sequence[CallDelta]) -> list[CallDelta]:
    """The whole calls, in order."""
    calls: list[CallDelta] = []
    texts: list[list[str]] = []
    for delta in deltas:
        if delta.index == len(calls):
            calls.append(CallDelta(delta.index, delta.id, delta.name, "", delta.kind))
            texts.append([])
        texts[delta.index].append(delta.arguments)
    for call, pieces in zip(calls, texts, strict=True):
        call.arguments = "".join(pieces)
    return calls
