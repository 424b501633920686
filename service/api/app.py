"""The HTTP application: routes, and errors in OpenAI's shape. Reads top to bottom as one list.

Starts nothing and reads no settings. Called by the composition root and by tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from service.api.backend import Backend
from service.api.batches import batches_router
from service.api.body import BodyLimits
from service.api.chat import chat_route
from service.api.classify import classify_router
from service.api.completions import completion_route
from service.api.easel import Easel
from service.api.embeddings import embedding_router
from service.api.envelope import CLIENT_GONE
from service.api.errors import error_response
from service.api.files import files_router
from service.api.gallery import Gallery, gallery_router
from service.api.images import images_router
from service.api.media import Media, MediaLimits
from service.api.messages import messages_router
from service.api.methods import with_head
from service.api.models import models_router
from service.api.ops import ops_router
from service.api.page import page_router
from service.api.rerank import rerank_router
from service.api.responses import responses_router
from service.api.responses_store import StoreLimits
from service.api.studio import Studio
from service.api.tokenize import tokenize_router
from service.api.videos import videos_router
from service.codec.prompt import Codec
from service.engine.client import EngineClient
from service.errors import BraidError, EngineError, MethodError, RequestError, RouteNotFoundError
from service.jobs.desk import Desk
from service.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Limits:
    """max_requests: in flight, as the engine client counts them."""

    body: BodyLimits = field(default_factory=BodyLimits)
    max_requests: int = 256
    responses: StoreLimits = field(default_factory=StoreLimits)
    media: MediaLimits = field(default_factory=MediaLimits)


def build_app(
    *,
    engine: EngineClient,
    codecs: Mapping[str, Codec],
    metrics: Metrics,
    limits: Limits | None = None,
    layers: Sequence[Middleware],
    desk: Desk | None = None,
) -> FastAPI:
    """codecs: by model name, the default first. layers: in front of the routes, from `make_layers`. desk: files and batches; None where
    the server keeps none."""
    limits = limits or Limits()
    backend = Backend(engine, codecs, metrics, limits.max_requests)
    studio = Studio(Easel(backend), Media(limits.media), Gallery())
    app = FastAPI(middleware=list(layers), openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_api_route("/v1/chat/completions", chat_route(studio, limits.body), methods=["POST"])
    app.add_api_route("/v1/completions", completion_route(backend, limits.body), methods=["POST"])
    app.include_router(responses_router(studio, limits.body, limits.responses))
    app.include_router(embedding_router(backend, limits.body))
    app.include_router(rerank_router(backend, limits.body))
    app.include_router(classify_router(backend, limits.body))
    app.include_router(messages_router(studio, limits.body))
    app.include_router(tokenize_router(backend, limits.body))
    app.include_router(files_router(desk, limits.body))
    app.include_router(batches_router(desk, limits.body))
    app.include_router(images_router(studio, limits.body))
    app.include_router(gallery_router(studio.gallery))
    app.include_router(videos_router(studio, limits.body))
    app.include_router(models_router(backend))
    app.include_router(ops_router(backend, metrics))
    app.include_router(page_router())

    app.add_exception_handler(BraidError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(error if isinstance(error, BraidError) else EngineError("The server had an error."))


async def _on_http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 400
    if status == 405:
        allowed = (getattr(error, "headers", None) or {}).get("Allow", "")
        return error_response(MethodError("this path does not take that method"), {"allow": with_head(allowed)})
    if status == 404:
        return error_response(RouteNotFoundError("there is no such path on this server"))
    return error_response(RequestError("the request can't be understood"))


async def _on_invalid(request: Request, error: Exception) -> Response:
    return error_response(RequestError("the request can't be understood"))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody reads it."""
    return Response(status_code=CLIENT_GONE)
