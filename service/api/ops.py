"""Routes for machines that look after the server, and the list of models: probes, version, metrics, models.

None of them waits for the engine or takes a lock that it holds.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from service.api.backend import Backend, context_of
from service.api.routes import VERSION
from service.engine.client import Health
from service.errors import ModelNotFoundError
from service.metrics import Metrics


def ops_router(backend: Backend, metrics: Metrics) -> APIRouter:
    """Raises, when called: ModelNotFoundError."""
    router = APIRouter(redirect_slashes=False)
    created = int(time.time())

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

    @router.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(backend, name, created) for name in backend.codecs]})

    @router.get("/v1/models/{model_id:path}")
    async def retrieve_model(model_id: str) -> Response:
        if model_id not in backend.codecs:
            raise ModelNotFoundError(f"The model `{model_id}` does not exist or you do not have access to it.", param="model")
        return JSONResponse(_model(backend, model_id, created))

    return router


def _state(health: Health, is_good: bool) -> Response:
    body = {"status": health.state, "detail": health.detail, "progress": round(health.progress, 4)}
    return JSONResponse(body, 200 if is_good else 503, None if is_good else {"retry-after": "1"})


def _model(backend: Backend, name: str, created: int) -> dict[str, Any]:
    """max_model_len and meta are what vLLM's and llama-server's clients read; sizes are known once the model is loaded."""
    codec = backend.codecs[name]
    info = backend.engine.models().get(name)
    meta: dict[str, Any] = {"n_ctx_train": codec.max_context, "n_vocab": codec.vocab_size}
    if info is not None:
        meta |= {"dtype": info.dtype, "weight_bytes": info.weight_bytes, "kv_tokens": info.kv_tokens}
    max_model_len = context_of(info) if info is not None else codec.max_context
    return {"id": name, "object": "model", "created": created, "owned_by": "braid", "max_model_len": max_model_len, "meta": meta}
