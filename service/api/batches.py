"""The routes under /v1/batches: start, list, describe and cancel batches, each tenant its own.

What a batch does is in `service.jobs`; its requests come back through the app by `insider`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter
from pydantic import Field, StringConstraints
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.body import BodyLimits, parse
from service.api.files import desk_of
from service.api.listing import page, page_limit
from service.api.routes import caller_of, warnings_header
from service.api.schema import Strict, Word, bounded
from service.jobs.batch import Batch
from service.jobs.desk import Desk

_MAX_METADATA = 16
_MAX_LIST = 100
_USUAL_LIST = 20
_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")

MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class OutputExpiry(Strict):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class BatchRequest(Strict):
    input_file_id: Word
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: Annotated[dict[MetadataKey, Word], Field(max_length=_MAX_METADATA), bounded(_MAX_METADATA)] | None = None
    output_expires_after: OutputExpiry | None = None


class Nothing(Strict):
    """The body of a request that needs none."""


def batches_router(desk: Desk | None, limits: BodyLimits) -> APIRouter:
    """Raises, when called: RequestError and its kinds, OverloadedError, StorageError, DeadlineError."""
    router = APIRouter(redirect_slashes=False)

    @router.post("/v1/batches")
    async def create_batch(request: Request) -> Response:
        wanted, warnings = await parse(request, BatchRequest, limits)
        known = desk_of(desk)
        source = known.files.get(caller_of(request).tenant, wanted.input_file_id, "input_file_id")
        expiry = wanted.output_expires_after
        batch = await known.batches.create(
            source, wanted.endpoint, metadata=wanted.metadata, output_lifetime_s=None if expiry is None else expiry.seconds
        )
        body = {**_view(batch), "warnings": warnings} if warnings else _view(batch)
        return JSONResponse(body, headers=warnings_header(warnings))

    @router.get("/v1/batches")
    async def list_batches(request: Request) -> Response:
        limit = page_limit(request.query_params, _USUAL_LIST, _MAX_LIST)
        found = [_view(batch) for batch in reversed(desk_of(desk).batches.of_tenant(caller_of(request).tenant))]
        return JSONResponse(page(found, request.query_params.get("after"), limit))

    @router.get("/v1/batches/{batch_id}")
    async def retrieve_batch(request: Request, batch_id: str) -> Response:
        return JSONResponse(_view(desk_of(desk).batches.get(caller_of(request).tenant, batch_id)))

    @router.post("/v1/batches/{batch_id}/cancel")
    async def cancel_batch(request: Request, batch_id: str) -> Response:
        if request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers:
            await parse(request, Nothing, limits)
        batches = desk_of(desk).batches
        batch = batches.get(caller_of(request).tenant, batch_id)
        await batches.cancel(batch)
        return JSONResponse(_view(batch))

    return router


def _view(batch: Batch) -> dict[str, Any]:
    errors = {"object": "list", "data": [msgspec.to_builtins(error) for error in batch.errors]} if batch.errors else None
    # Files are promised once they are there.
    is_over = batch.times.get(f"{batch.ending}_at") is not None
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": errors,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id if is_over else None,
        "error_file_id": batch.error_file_id if is_over else None,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        **{f"{status}_at": batch.times.get(f"{status}_at") for status in _TIMES},
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": batch.metadata,
    }
