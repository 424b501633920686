"""What the text routes share on the HTTP side: the caller, the fingerprint, the warnings header, whole or streamed."""

from __future__ import annotations

import hashlib
import time
from importlib import metadata
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.backend import Backend, Caller
from service.api.generation import Generation
from service.api.schema import SamplingFields
from service.api.shape import Shape
from service.api.sse import EventStream, WholeAnswer

_MAX_HEADER = 1024


def version() -> str:
    try:
        return metadata.version("braid")
    except metadata.PackageNotFoundError:  # run from its sources
        return "0.0.0"


VERSION = version()


def caller_of(request: Request) -> Caller:
    """What the layers in front of the routes found out."""
    state = request.scope.get("state", {})
    return Caller(state.get("tenant", ""), state.get("arrival", time.monotonic()), state.get("priority", 0))


def fingerprint(backend: Backend, model: str) -> str:
    """Changes with what could change a seeded answer: version, weights, precision."""
    info = backend.engine.models()[model]
    return "fp_" + hashlib.sha256(f"{VERSION} {model} {info.dtype} {info.weight_bytes}".encode()).hexdigest()[:12]


def warnings_header(warnings: list[str]) -> dict[str, str]:
    return {"x-braid-warnings": "; ".join(warnings)[:_MAX_HEADER]} if warnings else {}


def json_answer(body: dict[str, Any], warnings: list[str]) -> Response:
    """An answer that is whole at once, with its warnings."""
    return JSONResponse({**body, "warnings": warnings} if warnings else body, headers=warnings_header(warnings))


def answer(request: SamplingFields, generation: Generation, shape: Shape, warnings: list[str]) -> Response:
    headers = warnings_header(warnings)
    return EventStream(generation, shape, headers) if request.stream else WholeAnswer(generation, shape, headers)
