"""The routes under /v1/responses: create (whole, streamed, in the background), retrieve, stream again, cancel, delete, list, count.

Translation, events, storage and background work have files of their own; this one joins them.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from service.api.backend import Caller, context_of
from service.api.body import BodyLimits, checked, parse
from service.api.dialogue import Dialogue, converse, encode_prompt
from service.api.listing import is_descending, page_limit
from service.api.responses_background import Background, Job, replay
from service.api.responses_context import Context, context, ignored
from service.api.responses_input import chat_body, fitting, in_our_words, renamed, room_for_answer
from service.api.responses_schema import InputTokensRequest, PromptFields, ResponsesRequest
from service.api.responses_shape import ResponseAnswer, head
from service.api.responses_store import Item, ResponseStore, Stored, StoreLimits
from service.api.routes import caller_of, warnings_header
from service.api.schema import INT32
from service.api.schema_chat import ChatRequest
from service.api.sse import EventStream, WholeAnswer
from service.api.strict import Warnings
from service.api.studio import Studio
from service.errors import ContextLengthError, NotFoundError, RequestError

_MAX_PAGE = 100
_SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def responses_router(studio: Studio, limits: BodyLimits, stored: StoreLimits | None = None) -> APIRouter:
    """Raises, when called: RequestError and its kinds, OverloadedError, UnavailableError, DeadlineError."""
    responses = Responses(studio, limits, ResponseStore(stored))
    router = APIRouter()
    router.add_api_route("/v1/responses", responses.create, methods=["POST"])
    router.add_api_route("/v1/responses/input_tokens", responses.count, methods=["POST"])
    router.add_api_route("/v1/responses/{response_id}", responses.retrieve, methods=["GET"])
    router.add_api_route("/v1/responses/{response_id}", responses.delete, methods=["DELETE"])
    router.add_api_route("/v1/responses/{response_id}/cancel", responses.cancel, methods=["POST"])
    router.add_api_route("/v1/responses/{response_id}/input_items", responses.input_items, methods=["GET"])
    return router


class Responses:
    def __init__(self, studio: Studio, limits: BodyLimits, store: ResponseStore) -> None:
        self.store = store
        self._studio = studio
        self._backend = studio.easel.backend
        self._limits = limits
        self._background = Background(self._keep_job, store.limits.max_bytes)

    async def create(self, request: Request) -> Response:
        wanted, warnings = await parse(request, ResponsesRequest, self._limits)
        for param, text in ignored(wanted):
            warnings.note(param, text)
        caller = caller_of(request)
        if wanted.background and wanted.stream:
            self._background.check_room()
        found = context(wanted, self.store, caller.tenant)
        response_id = f"resp_{uuid.uuid4().hex}"
        with in_our_words():
            chat = await self._chat(wanted, found.items, warnings)
            dialogue = await converse(self._studio, chat, caller, response_id, warnings)
        warnings[:] = map(renamed, warnings)
        own = head(wanted, response_id, dialogue.model, _defaults(dialogue), warnings)
        headers = warnings_header(warnings)
        if wanted.background:
            return self._in_background(wanted, dialogue, own, found, caller, headers)
        answer = self._answer(wanted, dialogue, own, found, caller)
        form = Streamed if wanted.stream else Whole
        return form(dialogue.generation, answer, headers)

    async def count(self, request: Request) -> Response:
        wanted, warnings = await parse(request, InputTokensRequest, self._limits)
        found = context(wanted, self.store, caller_of(request).tenant)
        model = self._backend.choose(wanted.model, generates=True)
        with in_our_words():
            chat = await self._chat(wanted, found.items, warnings)
            prompt = await encode_prompt(self._backend, model, chat)
        return _json({"object": "response.input_tokens", "input_tokens": len(prompt)})

    async def _chat(self, wanted: PromptFields, items: Sequence[dict[str, Any]], warnings: Warnings) -> ChatRequest:
        """The request as chat has it, cut where truncation asks for that. Mutates: warnings. Raises: RequestError."""
        chat, _ = checked(chat_body(wanted, items), ChatRequest)
        if wanted.truncation == "disabled":
            return chat
        model = self._backend.choose(wanted.model, generates=True)
        context_len = context_of(self._backend.info(model))
        kept = await fitting(items, context_len - room_for_answer(chat.wanted_tokens, context_len), self._counter(wanted, model))
        if len(kept) == len(items):
            return chat
        warnings.note("truncation", f"truncation: the oldest {len(items) - len(kept)} items were left out")
        return checked(chat_body(wanted, kept), ChatRequest)[0]

    def _counter(self, wanted: PromptFields, model: str) -> Any:
        async def count(items: Sequence[dict[str, Any]]) -> int:
            chat, _ = checked(chat_body(wanted, items), ChatRequest)
            try:
                return len(await encode_prompt(self._backend, model, chat))
            except ContextLengthError:
                return INT32  # so long that nobody counted

        return count

    # --- answers

    def _answer(self, wanted: ResponsesRequest, dialogue: Dialogue, own: dict[str, Any], found: Context, caller: Caller) -> ResponseAnswer:
        def keep(answer: ResponseAnswer) -> None:
            self.store.put(caller.tenant, _stored(answer, found.stored))

        return ResponseAnswer(
            own,
            dialogue.generation,
            dialogue.codec.tokenizer,
            has_logprobs=wanted.has_logprobs,
            on_end=keep if wanted.store and not wanted.background else None,
        )

    def _in_background(
        self, wanted: ResponsesRequest, dialogue: Dialogue, own: dict[str, Any], found: Context, caller: Caller, headers: dict[str, str]
    ) -> Response:
        answer = self._answer(wanted, dialogue, own, found, caller)
        job = Job(answer, dialogue.generation, found.stored, has_log=wanted.stream)
        body = _json(answer.body(), headers)
        self._background.start(caller.tenant, job)
        return _events(job.follow(0), headers) if wanted.stream else body

    def _keep_job(self, tenant: str, job: Job) -> None:
        self.store.put(tenant, _stored(job.answer, job.inputs, job))

    # --- stored responses

    async def retrieve(self, request: Request, response_id: str) -> Response:
        tenant = caller_of(request).tenant
        is_stream = _flag(request, "stream")
        start = _first_event(request)
        job = self._background.get(tenant, response_id)
        if job is not None:
            if not is_stream:
                return _json(job.answer.body())
            _check_log(job.events)
            return _events(job.follow(start), {})
        stored = self._find(tenant, response_id)
        if not is_stream:
            return Response(stored.body, media_type="application/json")
        _check_log(stored.events)
        return _events(replay(stored.events, start), {})

    async def cancel(self, request: Request, response_id: str) -> Response:
        tenant = caller_of(request).tenant
        job = self._background.get(tenant, response_id)
        if job is not None:
            job.cancel()
            return _json(job.answer.body())
        stored = self._find(tenant, response_id)
        if not stored.is_background:
            raise RequestError("only a response that was created with background can be cancelled", param="response_id")
        return Response(stored.body, media_type="application/json")

    async def delete(self, request: Request, response_id: str) -> Response:
        tenant = caller_of(request).tenant
        if not self._background.delete(tenant, response_id) and not self.store.delete(tenant, response_id):
            raise _unknown(response_id)
        return _json({"id": response_id, "object": "response", "deleted": True})

    async def input_items(self, request: Request, response_id: str) -> Response:
        """All items that the response answers to, those of the responses before it included."""
        tenant = caller_of(request).tenant
        limit, is_newest_first = page_limit(request.query_params, 20, _MAX_PAGE), is_descending(request.query_params)
        job = self._background.get(tenant, response_id)
        inputs = job.inputs if job is not None else self._find(tenant, response_id).inputs
        return _page(inputs[::-1] if is_newest_first else inputs, request.query_params.get("after"), limit)

    def _find(self, tenant: str, response_id: str) -> Stored:
        stored = self.store.get(tenant, response_id)
        if stored is None:
            raise _unknown(response_id)
        return stored


class Whole(WholeAnswer):
    """One JSON body, errors in the words of this API."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with in_our_words():
            await super().__call__(scope, receive, send)


class Streamed(EventStream):
    """Events while the client reads. One that leaves ends the response, which is stored as cancelled."""

    def __init__(self, generation: Any, answer: ResponseAnswer, headers: dict[str, str]) -> None:
        super().__init__(generation, answer, headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with in_our_words():
            await super().__call__(scope, receive, send)
        if not self._answer.is_over:
            self._answer.cancelled()


def _defaults(dialogue: Dialogue) -> dict[str, float]:
    return {name: float(dialogue.codec.sampling_defaults.get(name, 1.0)) for name in ("temperature", "top_p")}


def _stored(answer: ResponseAnswer, inputs: tuple[Item, ...], job: Job | None = None) -> Stored:
    outputs = tuple(Item(item["id"], msgspec.json.encode(item)) for item in answer.items())
    events = tuple(job.events) if job is not None else ()
    return Stored(answer.id, msgspec.json.encode(answer.body()), inputs, outputs, is_background=job is not None, events=events)


def _json(body: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), headers=headers, media_type="application/json")


def _events(events: AsyncGenerator[bytes, None], headers: dict[str, str]) -> Response:
    return StreamingResponse(events, headers={**_SSE_HEADERS, **headers}, media_type="text/event-stream")


def _unknown(response_id: str) -> NotFoundError:
    name = "".join(char if 32 < ord(char) < 127 else "?" for char in response_id[:64])
    return NotFoundError(f"Response with id '{name}' not found: it was not stored, was deleted or evicted.", param="response_id")


def _check_log(events: Sequence[bytes]) -> None:
    if not events:
        raise RequestError("only a response that was created with background and stream can be streamed again", param="stream")


def _flag(request: Request, name: str) -> bool:
    text = request.query_params.get(name, "false").lower()
    if text not in ("true", "false", "1", "0"):
        raise RequestError(f"{name} must be true or false", param=name, code="invalid_value")
    return text in ("true", "1")


def _first_event(request: Request) -> int:
    """The number of the first event that is wanted."""
    text = request.query_params.get("starting_after", "")
    if text and not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise RequestError("starting_after must be the number of an event", param="starting_after", code="invalid_value")
    return int(text) + 1 if text else 0


def _page(items: Sequence[Item], after: str | None, limit: int) -> Response:
    start = 0
    if after is not None:
        start = next((index + 1 for index, item in enumerate(items) if item.id == after), -1)
        if start < 0:
            raise RequestError("after must be the id of one of the items", param="after", code="invalid_value")
    page = items[start : start + limit]
    ids = [item.id for item in page] or [""]
    data = [msgspec.Raw(item.data) for item in page]
    has_more = start + limit < len(items)
    return _json({"object": "list", "data": data, "first_id": ids[0], "last_id": ids[-1], "has_more": has_more})
