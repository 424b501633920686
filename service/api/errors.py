"""Errors as HTTP answers, in OpenAI's shape with the headers that its clients obey. The one place that knows both.

Called by the app's exception handlers, the layers in front of the routes, and the event stream.
"""

from __future__ import annotations

import math

import msgspec
from starlette.responses import Response

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
    return Response(error_bytes(error), error.status, headers, "application/json")


def error_bytes(error: BraidError) -> bytes:
    return msgspec.json.encode(error.body())
