"""POST /v1/embeddings: texts or ids in, vectors of length one out, as numbers or base64.

No pooling and no tokens: those are in `vectors`.
"""

from __future__ import annotations

import base64
import uuid
from typing import Any

import msgspec
import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from service.api.backend import Backend, Caller
from service.api.body import BodyLimits, parse
from service.api.readings import while_connected
from service.api.routes import caller_of, warnings_header
from service.api.schema_vectors import EmbeddingRequest
from service.api.strict import Warnings
from service.api.vectors import Vectors, choose_embedder, embed


def embedding_router(backend: Backend, limits: BodyLimits) -> APIRouter:
    """Raises, when called: RequestError and its kinds, OverloadedError, UnavailableError, DeadlineError, EngineError."""
    router = APIRouter(redirect_slashes=False)

    @router.post("/v1/embeddings")
    async def create_embeddings(request: Request) -> Response:
        wanted, warnings = await parse(request, EmbeddingRequest, limits)
        body = await while_connected(request, embeddings(backend, wanted, caller_of(request), warnings))
        return reply(body, warnings)

    return router


async def embeddings(backend: Backend, wanted: EmbeddingRequest, caller: Caller, warnings: Warnings) -> dict[str, Any]:
    """The answer's body. Mutates: warnings."""
    model = choose_embedder(backend, wanted.model)
    inputs = wanted.inputs
    is_single = inputs is not wanted.input

    def where(index: int) -> str:
        return "input" if is_single else f"input[{index}]"

    found = await embed(
        backend,
        model,
        inputs,
        wanted,
        caller,
        f"embd-{uuid.uuid4().hex}",
        where=where,
        warnings=warnings,
        pooling=wanted.pooling,
        dimensions=wanted.dimensions,
    )
    vectors = spelled(found.rows, wanted.encoding_format)
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return {"object": "list", "data": data, "model": model, "usage": usage(found)}


def spelled(rows: NDArray[np.float32], encoding_format: str) -> list[str] | list[list[float]]:
    """Each row as the client wants it; base64 holds float32, little-endian."""
    if encoding_format == "base64":
        return [base64.b64encode(row.tobytes()).decode("ascii") for row in rows.astype("<f4", copy=False)]
    numbers: list[list[float]] = rows.tolist()
    return numbers


def usage(found: Vectors) -> dict[str, Any]:
    return {
        "prompt_tokens": found.prompt_tokens,
        "total_tokens": found.prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": found.cached_tokens},
    }


def reply(body: dict[str, Any], warnings: list[str]) -> Response:
    """JSON, with the warnings in it and in the header."""
    body = {**body, "warnings": warnings} if warnings else body
    return Response(msgspec.json.encode(body), headers=warnings_header(warnings), media_type="application/json")
