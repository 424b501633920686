"""The outermost layer of the app: a request id on every answer, the time it took, an HTTP count, and no fault without an answer.

Knows nothing of what a route does. Wraps everything else, the key check included.
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import error_response
from service.errors import EngineError, HeaderTooLargeError, RequestError
from service.metrics import Metrics

log = logging.getLogger("braid.http")

_SANE_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
CLIENT_GONE = 499
MAX_HEADERS = 256
MAX_HEADER_BYTES = 32 * 2**10


class Envelope:
    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        arrival = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        # The client's own word is only echoed: inside, ids are always ours.
        request_id = given if _SANE_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {}).update(arrival=arrival, request_id=request_id)
        status = CLIENT_GONE

        async def send_signed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                milliseconds = str(round((time.monotonic() - arrival) * 1e3))
                headers = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", milliseconds.encode()),
                    (b"openai-version", b"2020-10-01"),
                ]
                message = {**message, "headers": headers}
            await send(message)

        try:
            _check_header(scope)
            await self.app(scope, receive, send_signed)
        except RequestError as error:
            await error_response(error, {"connection": "close"})(scope, receive, send_signed)
        except Exception:
            log.exception("request %s failed", request_id)
            if status != CLIENT_GONE:
                raise
            await error_response(EngineError("The server had an error while it worked on this request."))(scope, receive, send_signed)
        finally:
            self.metrics.count_http(scope["method"], getattr(scope.get("route"), "path", None), status)


def _check_header(scope: Scope) -> None:
    """The parser bounds only a header that does not come in one piece. A body whose length is told in two ways is how requests are
    smuggled past a proxy (RFC 9112, section 6.1). Raises: HeaderTooLargeError, RequestError."""
    fields = scope["headers"]
    if {b"transfer-encoding", b"content-length"} <= {name for name, _ in fields}:
        raise RequestError("a request must have Content-Length or Transfer-Encoding, not both")
    if len(fields) > MAX_HEADERS:
        raise HeaderTooLargeError(f"the header has {len(fields)} fields; at most {MAX_HEADERS} are allowed")
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"]) + sum(len(name) + len(value) for name, value in fields)
    if size > MAX_HEADER_BYTES:
        raise HeaderTooLargeError(f"the header has {size} bytes; at most {MAX_HEADER_BYTES} are allowed")
