"""What stands open from the first moment: probes are answered at once, every other request waits until the app is there.

Most of what the HTTP process imports is the app's (FastAPI, the schemas, tokenizers), and takes as long as the engine takes to import
torch; none of it is needed to say that the server is loading. ASGI, without FastAPI. Called by the composition root; the probes are the
app's too (`ops`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import error_response
from service.api.layers import behind
from service.engine.client import EngineClient, Health
from service.errors import UnavailableError


class Probes:
    """The answers to those who look whether the server is well. None of them waits for the engine or takes a lock that it holds."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self.by_path: dict[str, Callable[[], Awaitable[Response]]] = {
            "/live": self.live,
            "/health": self.health,
            "/ping": self.health,
            "/ready": self.ready,
        }

    async def live(self) -> Response:
        """This process answers."""
        return JSONResponse({"status": "ok"})

    async def health(self) -> Response:
        """The engine is there, loaded, and its steps end in time."""
        found = self._engine.health()
        return _state(found, found.state in ("ready", "draining"))

    async def ready(self) -> Response:
        """New work is taken."""
        found = self._engine.health()
        return _state(found, found.state == "ready")


def _state(health: Health, is_good: bool) -> Response:
    body = {"status": health.state, "detail": health.detail, "progress": round(health.progress, 4)}
    return JSONResponse(body, 200 if is_good else 503, None if is_good else {"retry-after": "1"})


@dataclass(frozen=True, slots=True)
class _Route:
    """What the envelope counts by."""

    path: str


class Door:
    """An ASGI app. layers: those of the app, for what is answered before it is there."""

    def __init__(self, probes: Probes, layers: Sequence[Middleware]) -> None:
        self._probes = probes.by_path
        self._entrance = behind(layers, self._probe)
        self._refusal = behind(layers, _refuse)
        self._app: ASGIApp | None = None
        self._moved = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if app is None and scope["type"] == "http":
            if scope["path"] in self._probes and scope["method"] in ("GET", "HEAD"):
                app = self._entrance
            else:
                await self._moved.wait()
                app = self._app
        await (app or self._refusal)(scope, receive, send)

    def open(self, app: ASGIApp) -> None:
        """Lets those in who wait, and everybody from now on."""
        self._app = app
        self._moved.set()

    def shut(self) -> None:
        """Refuses those who wait, if the app never came. Else nothing happens."""
        self._moved.set()

    async def _probe(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = _Route(scope["path"])
        answer = await self._probes[scope["path"]]()
        await answer(scope, receive, send)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    await error_response(UnavailableError("The server is shutting down.", retry_after_s=2.0))(scope, receive, send)
