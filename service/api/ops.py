"""Routes for machines that look after the server: probes, version, metrics.

None of them waits for the engine or takes a lock that it holds.
"""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from service.api.backend import Backend
from service.api.routes import VERSION
from service.engine.client import Health
from service.metrics import Metrics


def ops_router(backend: Backend, metrics: Metrics) -> APIRouter:
    router = APIRouter(redirect_slashes=False)

    @router.get("/live")
    async def live() -> Response:
        """This process answers."""
        return JSONResponse({"status": "ok"})

    @router.get("/health")
    async def health() -> Response:
        """The engine is there, loaded, and its steps end in time."""
        found = backend.engine.health()
        return _state(found, found.state in ("ready", "draining"))

    @router.get("/ping")
    async def ping() -> Response:
        """The same as /health, under the name that some hosts ask for."""
        return await health()

    @router.get("/ready")
    async def ready() -> Response:
        """New work is taken."""
        found = backend.engine.health()
        return _state(found, found.state == "ready")

    @router.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": VERSION})

    @router.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return router


def _state(health: Health, is_good: bool) -> Response:
    body = {"status": health.state, "detail": health.detail, "progress": round(health.progress, 4)}
    return JSONResponse(body, 200 if is_good else 503, None if is_good else {"retry-after": "1"})
