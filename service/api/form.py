"""Multipart forms, read with caps and a time limit: files go to disk where they are large, and are gone when the block ends.

Knows no field's meaning. Called by the routes that take files.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from service.api.body import BodyLimits, R, Share, discard, parse, printable
from service.api.strict import Warnings
from service.errors import BodyTooLargeError, DeadlineError, ForbiddenError, MediaTypeError, RequestError
from service.jobs.files import storage_error

_TOTAL_S = 1800.0

Source = tuple[str, "str | bytes"]
"""The field that something came in, and its URL or its bytes."""


@dataclass(frozen=True, slots=True)
class FormLimits:
    """max_bytes: of the whole form; param: what is named when there are more. idle_s: the longest pause. origins: of pages that may send
    it; the server's own always may."""

    max_bytes: int
    max_files: int = 1
    max_fields: int = 8
    max_field_bytes: int = 4096
    idle_s: float = 9.0
    param: str = "file"
    origins: tuple[str, ...] = ()


def is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"


@contextlib.asynccontextmanager
async def read_form(request: Request, limits: FormLimits) -> AsyncIterator[FormData]:
    """The request's form while the block runs; what it spooled to disk is gone afterwards.

    Raises: MediaTypeError, ForbiddenError, BodyTooLargeError, DeadlineError, RequestError, StorageError.
    """
    if not is_form(request):
        raise MediaTypeError("a file is sent as a form: Content-Type: multipart/form-data")
    _check_origin(request, limits.origins)
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


def form_texts(form: FormData, files: Sequence[str]) -> dict[str, str]:
    """The fields that are no files. files: names of those that are. Raises: RequestError for one that is twice there, or is a file."""
    texts: dict[str, str] = {}
    for name, value in form.multi_items():
        if name in files:
            continue
        if not isinstance(value, str):
            raise RequestError(f"{printable(name)} must be a text and no file", param=printable(name))
        if name in texts:
            raise RequestError(f"{printable(name)} was given twice", param=printable(name))
        texts[name] = value
    return texts


async def form_file(value: UploadFile | str, name: str, share: Share) -> Source:
    """A file's bytes, counted in the share of what all requests hold. Raises: RequestError, OverloadedError."""
    param = name.removesuffix("[]")
    if not isinstance(value, UploadFile):
        raise RequestError(f"{param} must be a file, with a filename", param=param)
    share.grow(value.size or 0)
    return param, await value.read()


async def parse_either(request: Request, kind: type[R], limits: BodyLimits) -> tuple[R, Warnings]:
    """As `body.parse`, of a route that takes forms too. Raises: as that."""
    try:
        return await parse(request, kind, limits)
    except MediaTypeError as error:
        raise MediaTypeError(f"{error.message}, or a form: multipart/form-data") from None


def _check_origin(request: Request, origins: tuple[str, ...]) -> None:
    """A browser sends a form to any server without asking it first, unlike JSON; but it says whose page it was. Raises: ForbiddenError."""
    origin = request.headers.get("origin")
    if origin is None or "*" in origins or origin in origins:
        return
    with contextlib.suppress(ValueError):  # an origin that is none is a stranger's
        if urlsplit(origin).netloc == request.headers.get("host"):
            return
    raise ForbiddenError("pages of other origins may not send forms to this server; --allow-origin lets one")


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
