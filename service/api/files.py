"""The routes under /v1/files: bring, list, describe, fetch and delete files, each tenant its own.

Names from clients are only told back. The store does the work, in threads, since disks block.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from fastapi import APIRouter
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from service.api.body import BodyLimits, printable
from service.api.form import FormLimits, read_form
from service.api.listing import is_descending, page, page_limit
from service.api.routes import caller_of, json_answer
from service.api.strict import Warnings
from service.errors import RequestError
from service.jobs.desk import Desk
from service.jobs.files import StoredFile

PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
_LISTED = (*PURPOSES, "batch_output")
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = ("file", "purpose", _ANCHOR, _SECONDS)
_MAX_LIST = 10_000
_MAX_FIELDS = 8
_MAX_NAME = 255
_MAX_EXTRA_BYTES = 64 * 1024  # of the form around the file
_LIFETIME_S = (3600, 2_592_000)
_OFF = "this server keeps no files: it was started without a data folder"


def desk_of(desk: Desk | None) -> Desk:
    """Raises: RequestError where the server has no data folder."""
    if desk is None:
        raise RequestError(_OFF, code="unsupported_operation")
    return desk


def files_router(desk: Desk | None, limits: BodyLimits) -> APIRouter:
    """Raises, when called: RequestError and its kinds, StorageError, DeadlineError."""
    router = APIRouter(redirect_slashes=False)

    @router.post("/v1/files")
    async def create_file(request: Request) -> Response:
        store = desk_of(desk).files
        form_limits = FormLimits(
            store.max_file_bytes + _MAX_EXTRA_BYTES, max_fields=_MAX_FIELDS, idle_s=limits.idle_s, origins=limits.origins
        )
        async with read_form(request, form_limits) as form:
            upload, purpose, lifetime_s = _fields(form)
            warnings = _unknown(form, Warnings(limits.is_strict))
            stored = await asyncio.to_thread(
                store.create,
                upload.file,
                tenant=caller_of(request).tenant,
                filename=_filename(upload.filename),
                purpose=purpose,
                lifetime_s=lifetime_s,
            )
        return json_answer(_view(stored), warnings)

    @router.get("/v1/files")
    async def list_files(request: Request) -> Response:
        store = desk_of(desk).files
        query = request.query_params
        purpose = query.get("purpose")
        if purpose is not None and purpose not in _LISTED:
            raise RequestError(f"purpose must be one of {', '.join(_LISTED)}", param="purpose")
        limit, is_reversed = page_limit(query, _MAX_LIST, _MAX_LIST), is_descending(query)
        found = [_view(file) for file in await asyncio.to_thread(store.of_tenant, caller_of(request).tenant, purpose)]
        return JSONResponse(page(found[::-1] if is_reversed else found, query.get("after"), limit))

    @router.get("/v1/files/{file_id}")
    async def retrieve_file(request: Request, file_id: str) -> Response:
        return JSONResponse(_view(desk_of(desk).files.get(caller_of(request).tenant, file_id)))

    @router.get("/v1/files/{file_id}/content")
    async def file_content(request: Request, file_id: str) -> Response:
        store = desk_of(desk).files
        path = store.path(store.get(caller_of(request).tenant, file_id))
        # A browser that is led here must not run what somebody uploaded.
        headers = {"content-disposition": "attachment", "x-content-type-options": "nosniff"}
        # One that says nothing, or several, is ignored, as HTTP has it; Starlette would answer with a 400 that is no JSON.
        if not _is_range(request.headers.get("range", "")):
            request.scope["headers"] = [field for field in request.scope["headers"] if field[0] != b"range"]
        return FileResponse(path, media_type="application/octet-stream", headers=headers)

    @router.delete("/v1/files/{file_id}")
    async def delete_file(request: Request, file_id: str) -> Response:
        known = desk_of(desk)
        file = known.files.get(caller_of(request).tenant, file_id)
        if known.batches.uses(file_id):
            raise RequestError("a batch that has not ended reads this file: cancel it first", param="id")
        await asyncio.to_thread(known.files.delete, file)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    return router


def _view(file: StoredFile) -> dict[str, Any]:
    body: dict[str, Any] = {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }
    return body if file.expires_at is None else {**body, "expires_at": file.expires_at}


def _fields(form: FormData) -> tuple[UploadFile, str, int | None]:
    """The file, its purpose and how long it is kept, None for ever. Raises: RequestError."""
    upload, purpose = form.get("file"), form.get("purpose")
    for name, value in (("file", upload), ("purpose", purpose)):
        if value is None:
            raise RequestError(f"{name} is required", param=name, code="missing_required_parameter")
    if not isinstance(upload, UploadFile):
        raise RequestError("file must be a file, with a filename", param="file")
    if purpose not in PURPOSES:
        raise RequestError(f"purpose must be one of {', '.join(PURPOSES)}", param="purpose")
    return upload, str(purpose), lifetime_of(form.get(_ANCHOR), form.get(_SECONDS))


def _unknown(form: FormData, warnings: Warnings) -> Warnings:
    """Notes the fields that are ignored. Mutates: warnings. Raises: RequestError where strict."""
    for name in dict.fromkeys(form):
        if name not in _FIELDS:
            warnings.note(printable(name), f"unknown field {printable(name)!r} was ignored")
    return warnings


def _is_range(text: str) -> bool:
    """Does a Range header ask for one stretch of bytes?"""
    found = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", text)
    if found is None or not any(found.groups()):
        return False
    first, last = found.groups()
    return not (first and last) or int(first) <= int(last)


def lifetime_of(anchor: Any, seconds: Any, anchors: tuple[str, ...] = ("created_at",)) -> int | None:
    """In seconds; None when neither is given. Raises: RequestError."""
    if anchor is None and seconds is None:
        return None
    if anchor not in anchors:
        raise RequestError(f"expires_after.anchor must be {' or '.join(anchors)}", param="expires_after.anchor")
    least, most = _LIFETIME_S
    text = str(seconds)
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or not least <= int(text) <= most:
        raise RequestError(f"expires_after.seconds must be a whole number from {least} to {most}", param="expires_after.seconds")
    return int(text)


def _filename(given: str | None) -> str:
    """A client's name for it, as data: what can't be shown is replaced, what is too long is cut."""
    return "".join(char if char.isprintable() else "?" for char in given or "")[:_MAX_NAME] or "file"
