"""Routes for machines that look after the server: probes (those of `door`), version, metrics.

None of them waits for the engine or takes a lock that it holds.
"""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from service.api.backend import Backend
from service.api.door import Probes
from service.api.routes import VERSION
from service.metrics import Metrics


def ops_router(backend: Backend, metrics: Metrics) -> APIRouter:
    router = APIRouter(redirect_slashes=False)

    probes = Probes(backend.engine)
    for path, answer in probes.by_path.items():
        router.add_api_route(path, answer, methods=["GET"])

    @router.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": VERSION})

    @router.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return router
