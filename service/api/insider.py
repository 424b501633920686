"""The server's own requests to itself: a line of a batch goes through the app as if it had come over the wire, layers and all.

It is let in by what only this process can put into a request's scope. Made by the composition root, called by the batches.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.auth import INSIDER, Insider
from service.jobs.batch import Outcome

# Added to a request's own priority: what somebody waits for runs first.
PRIORITY = 1_000_000
_HEADERS = {"content-type": "application/json"}


class SelfCaller:
    """Called with tenant, path and body: posts it to the app and waits for the whole answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, tenant: str, path: str, body: bytes) -> Outcome:
        import httpx  # batches alone need it, and it is a tenth of all that the server imports at start

        async def inside(scope: Scope, receive: Receive, send: Send) -> None:
            scope[INSIDER] = Insider(tenant, PRIORITY)
            await self._app(scope, receive, send)

        transport = httpx.ASGITransport(inside, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client:  # noqa: S113  # the batch has one
            answer = await client.post(path, content=body, headers=_HEADERS)
        wait = answer.headers.get("retry-after", "")
        request_id = answer.headers.get("x-request-id", "")
        return Outcome(answer.status_code, request_id, answer.content, float(wait) if wait.isdecimal() else None)
