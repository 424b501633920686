"""Multipart forms, read with caps and a time limit: files go to disk where they are large, and are gone when the block ends.

Knows no field's meaning. Called by the routes that take files.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from service.api.body import discard
from service.errors import BodyTooLargeError, DeadlineError, MediaTypeError, RequestError
from service.jobs.files import storage_error

_TOTAL_S = 1800.0


@dataclass(frozen=True, slots=True)
class FormLimits:
    """max_bytes: of the whole form; param: what is named when there are more. idle_s: the longest pause."""

    max_bytes: int
    max_files: int = 1
    max_fields: int = 8
    max_field_bytes: int = 4096
    idle_s: float = 9.0
    param: str = "file"


def is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"


@contextlib.asynccontextmanager
async def read_form(request: Request, limits: FormLimits) -> AsyncIterator[FormData]:
    """The request's form while the block runs; what it spooled to disk is gone afterwards.

    Raises: MediaTypeError, BodyTooLargeError, DeadlineError, RequestError, StorageError.
    """
    if not is_form(request):
        raise MediaTypeError("a file is sent as a form: Content-Type: multipart/form-data")
    length = request.headers.get("content-length", "")
    try:
        if length.isdecimal() and int(length) > limits.max_bytes:
            raise _too_large(limits)
        watched = Request(request.scope, _Counted(request, limits))
        async with asyncio.timeout(_TOTAL_S):
            form = await watched.form(max_files=limits.max_files, max_fields=limits.max_fields, max_part_size=limits.max_field_bytes)
    except BodyTooLargeError:
        await discard(request)
        raise
    except TimeoutError:
        raise DeadlineError("the request's body did not arrive in time", code="request_timeout") from None
    except HTTPException as error:
        raise RequestError(f"the form can't be read: {error.detail}") from None
    except OSError as error:
        raise storage_error(error) from error
    try:
        yield form
    finally:
        await form.close()


def _too_large(limits: FormLimits) -> BodyTooLargeError:
    return BodyTooLargeError(f"the form is larger than {limits.max_bytes} bytes, which is the limit", param=limits.param)


class _Counted:
    """A request's messages as they come, as long as they are not too many bytes and do not pause too long."""

    def __init__(self, request: Request, limits: FormLimits) -> None:
        self._receive = request.receive
        self._limits = limits
        self._left = limits.max_bytes

    async def __call__(self) -> Message:
        async with asyncio.timeout(self._limits.idle_s):
            message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise _too_large(self._limits)
        return message
