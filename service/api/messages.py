"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API over the same road as every chat.

What a request means is in `messages_input`, what its answer looks like in `messages_shape`. Errors take Anthropic's form by their path.
"""

from __future__ import annotations

import uuid

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.body import BodyLimits, checked, parse
from service.api.dialogue import converse, encode_prompt
from service.api.messages_error import renamed
from service.api.messages_input import chat_request
from service.api.messages_schema import ConversationFields, CountTokensRequest, MessagesRequest
from service.api.messages_shape import MessagesShape
from service.api.routes import caller_of, warnings_header
from service.api.schema_chat import ChatRequest
from service.api.sse import EventStream, WholeAnswer
from service.api.strict import Warnings
from service.api.studio import Studio


def messages_router(studio: Studio, limits: BodyLimits) -> APIRouter:
    """Raises, when called: RequestError and its kinds, OverloadedError, UnavailableError, DeadlineError."""
    router = APIRouter(redirect_slashes=False)

    def translated(wanted: ConversationFields, warnings: Warnings) -> ChatRequest:
        """Mutates: warnings."""
        body, ignored = chat_request(wanted)
        for param, text in ignored:
            warnings.note(param, text)
        return checked(body, ChatRequest)[0]

    @router.post("/v1/messages")
    async def create_message(request: Request) -> Response:
        wanted, warnings = await parse(request, MessagesRequest, limits)
        chat = translated(wanted, warnings)
        message_id = f"msg_{uuid.uuid4().hex}"
        dialogue = await converse(studio, chat, caller_of(request), message_id, warnings)
        warnings[:] = map(renamed, warnings)
        request_id = _request_id(request)
        shape = MessagesShape({"id": message_id, "model": dialogue.model}, dialogue.generation, request_id, warnings)
        headers = {**warnings_header(warnings), "request-id": request_id}
        return (EventStream if wanted.stream else WholeAnswer)(dialogue.generation, shape, headers)

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        wanted, warnings = await parse(request, CountTokensRequest, limits)
        chat = translated(wanted, warnings)
        model = studio.easel.backend.choose(chat.model)
        num_tokens = len(await encode_prompt(studio.easel.backend, model, chat))
        headers = {**warnings_header(warnings), "request-id": _request_id(request)}
        return JSONResponse({"input_tokens": num_tokens}, headers=headers)

    return router


def _request_id(request: Request) -> str:
    return str(request.scope.get("state", {}).get("request_id", ""))
