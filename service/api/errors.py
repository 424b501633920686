"""Errors as HTTP answers, in OpenAI's shape (Anthropic's on its routes) with the headers that clients obey. The one place that knows all.

Called by the app's exception handlers, the layers in front of the routes, and the event stream.
"""

from __future__ import annotations

import math

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.messages_error import is_messages_path, messages_error
from service.errors import (
    AuthenticationError,
    BodyTooLargeError,
    BraidError,
    DeadlineError,
    MediaTypeError,
    UnavailableError,
)

# Answers after which the rest of the request is not read, or after which no more is wanted.
_CLOSING = (BodyTooLargeError, DeadlineError, MediaTypeError, UnavailableError)


class ErrorAnswer(Response):
    """An error in the form of the API that was asked, which only the path tells: Anthropic's clients read another one than OpenAI's."""

    def __init__(self, error: BraidError, headers: dict[str, str]) -> None:
        super().__init__(error_bytes(error), error.status, headers, "application/json")
        self._error = error
        self._given = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_messages_path(scope.get("path", "")):
            await super().__call__(scope, receive, send)
            return
        request_id = scope.get("state", {}).get("request_id", "")
        headers = {**self._given, "request-id": request_id}
        await Response(messages_error(self._error, request_id), self.status_code, headers, "application/json")(scope, receive, send)


def error_response(error: BraidError, headers: dict[str, str] | None = None) -> Response:
    """The answer to a request that failed before anything of its answer was sent."""
    headers = dict(headers or {})
    if error.status >= 500 or error.status in (408, 409, 429):
        # OpenAI's clients send such a request twice more unless told otherwise.
        headers["x-should-retry"] = "true" if error.retry else "false"
    if error.retry:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 1.0)))
    if isinstance(error, AuthenticationError):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, _CLOSING):
        headers["connection"] = "close"
    return ErrorAnswer(error, headers)


def error_bytes(error: BraidError) -> bytes:
    return msgspec.json.encode(error.body())
