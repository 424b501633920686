"""From bytes on the wire to a checked request: reading with a cap and a time limit, JSON, schema, errors that name the field,
and warnings about what was ignored.

The one validator of all routes. Knows no engine and no model. How much a JSON text may hold stands in `json_bounds`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request

from service.api.json_bounds import check_depth, check_size
from service.api.schema import Strict
from service.api.strict import Warnings
from service.errors import BodyTooLargeError, DeadlineError, MediaTypeError, OverloadedError, RequestError

MAX_TOTAL_BYTES = 256 * 2**20
_MAX_NAME = 64
_DISCARD_S = 1.0
_DISCARD_BYTES = 64 * 2**20

R = TypeVar("R", bound=Strict)


class BodyRoom:
    """The bytes of all bodies that are being read or checked at the moment, so that many clients together can't fill the memory."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self.max_bytes = max_bytes

    @contextlib.contextmanager
    def share(self) -> Iterator[Share]:
        """One body's share, given back at the end."""
        share = Share(self)
        try:
            yield share
        finally:
            self.num_bytes -= share.num_bytes


class Share:
    def __init__(self, room: BodyRoom) -> None:
        self.num_bytes = 0
        self._room = room

    def grow(self, num_bytes: int) -> None:
        """Raises: OverloadedError; not for a body that is alone, which has a limit of its own."""
        room = self._room
        if room.num_bytes > self.num_bytes and room.num_bytes + num_bytes > room.max_bytes:
            raise OverloadedError("too many large requests are being read at the moment", retry_after_s=1.0)
        self.num_bytes += num_bytes
        room.num_bytes += num_bytes


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """idle_s: the longest pause between two pieces; total_s: from the first to the last. is_strict: an unknown field is an error.
    origins: of web pages that may send forms. room: what all bodies share."""

    max_bytes: int = 32 * 2**20
    idle_s: float = 9.0
    total_s: float = 120.0
    is_strict: bool = False
    origins: tuple[str, ...] = ()
    room: BodyRoom = field(default_factory=lambda: BodyRoom(MAX_TOTAL_BYTES))


async def parse(request: Request, kind: type[R], limits: BodyLimits) -> tuple[R, Warnings]:
    """The request, and warnings about fields that were ignored. Raises: RequestError and its kinds; DeadlineError for a slow body;
    OverloadedError when too much is being read."""
    with limits.room.share() as share:
        return validate(await _read(request, limits, share), kind, limits.is_strict)


async def read(request: Request, limits: BodyLimits) -> bytes:
    """The bytes alone, for a route that checks them itself. Raises: as `parse`, and ClientDisconnect when there is nobody to answer."""
    with limits.room.share() as share:
        return await _read(request, limits, share)


async def _read(request: Request, limits: BodyLimits, share: Share) -> bytes:
    _check_headers(request)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.max_bytes:
        await discard(request)
        raise _too_large(limits)
    body = bytearray()
    end = time.monotonic() + limits.total_s
    pieces = request.stream()
    try:
        while True:
            async with asyncio.timeout(min(limits.idle_s, end - time.monotonic())):
                piece = await anext(pieces)
            share.grow(len(piece))
            body += piece
            if len(body) > limits.max_bytes:
                body.clear()
                await discard(request)
                raise _too_large(limits)
    except StopAsyncIteration:
        return bytes(body)
    except TimeoutError:
        raise DeadlineError("the request's body did not arrive in time", code="request_timeout") from None


def _check_headers(request: Request) -> None:
    media_type, _, parameters = request.headers.get("content-type", "").partition(";")
    if media_type.strip().lower() != "application/json":
        raise MediaTypeError("the body must be JSON: send Content-Type: application/json")
    charset = parameters.replace(" ", "").replace('"', "").lower()
    if "charset=" in charset and "charset=utf-8" not in charset:
        raise MediaTypeError("the body must be JSON in UTF-8")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise MediaTypeError("compressed request bodies are not accepted")


def _too_large(limits: BodyLimits) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is larger than {limits.max_bytes} bytes, which is the limit")


async def discard(request: Request) -> None:
    """Reads a while without keeping anything: a client that is still writing when the connection closes would miss the answer."""
    if "expect" in request.headers:
        return
    read = 0
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(_DISCARD_S):
            while read < _DISCARD_BYTES:
                message = await request.receive()
                read += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    return


def validate(body: bytes, kind: type[R], is_strict: bool = False) -> tuple[R, Warnings]:
    """Raises: RequestError with `param` naming the first field that is wrong, or in strict mode unknown."""
    return checked(_decode(body, kind), kind, is_strict)


def checked(data: dict[str, Any], kind: type[R], is_strict: bool = False, *, is_form: bool = False) -> tuple[R, Warnings]:
    """The same for a JSON object at hand: a line of a batch, or what another API's route translated; or for the fields of a form, whose
    numbers are texts. Raises: RequestError."""
    _check_unbuilt(data, kind)
    parsed = _validate(data, kind, is_form)
    parsed.check()
    warnings = Warnings(is_strict)
    for name in parsed.unknown_fields():
        if warnings.is_full:
            break
        if name not in kind.unbuilt:
            warnings.note(printable(name), f"unknown field {printable(name)!r} was ignored")
    return parsed, warnings


def _decode(body: bytes, kind: type[R]) -> dict[str, Any]:
    check_size(body)
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _name_bad_field(body, kind)
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else _reason(error)
        raise RequestError(f"the body is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    check_depth(data, body)
    return data


def _reason(error: Exception) -> str:
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).removeprefix("JSON is malformed: ")


def _name_bad_field(body: bytes, kind: type[R]) -> None:
    """For what strict JSON refuses and Python reads (NaN, 1e999, half a surrogate pair), the schema can say in which field it is.

    Raises: RequestError when it can.
    """
    with contextlib.suppress(ValueError, RecursionError):
        data = json.loads(body.decode("utf-8"), parse_int=_lenient_int)
        if isinstance(data, dict):
            _validate(data, kind)


def _lenient_int(digits: str) -> int | float:
    return int(digits) if len(digits) < 400 else float("inf")


def _check_unbuilt(data: dict[str, Any], kind: type[R]) -> None:
    for name, is_neutral in kind.unbuilt.items():
        value = data.get(name)
        if value is not None and not is_neutral(value):
            raise RequestError(f"{name} is not supported by this server", param=name, code="unsupported_parameter")


def _validate(data: dict[str, Any], kind: type[R], is_form: bool = False) -> R:
    try:
        return kind.model_validate_strings(data, strict=False) if is_form else kind.model_validate(data)
    except ValidationError as error:
        raise _request_error(error.errors(include_url=False, include_input=False)[0], data) from None


def _request_error(problem: ErrorDetails, data: dict[str, Any]) -> RequestError:
    is_missing = problem["type"] == "missing"
    param = _param(problem["loc"], data, is_missing)
    if is_missing:
        return RequestError(f"{param} is required", param=param, code="missing_required_parameter")
    text = "must be an object" if problem["type"] == "model_type" else problem["msg"].removeprefix("Value error, ")
    text = text.replace(" after validation", "").replace(
        ", unable to parse raw data as a unicode string", ": half a surrogate pair is none"
    )
    code = "invalid_type" if problem["type"].endswith("_type") else "invalid_value"
    return RequestError(f"{param or 'the body'}: {text[:1].lower()}{text[1:]}", param=param or None, code=code)


def _param(loc: tuple[int | str, ...], data: Any, is_missing: bool) -> str:
    """pydantic's place as `messages[1].content`: it mixes the names of union members in, which are not in the data."""
    path = ""
    for place, key in enumerate(loc):
        if isinstance(data, list) and isinstance(key, int) and key < len(data):
            path += f"[{key}]"
            data = data[key]
        elif isinstance(data, dict) and (key in data or (is_missing and place == len(loc) - 1)):
            path += f".{printable(str(key))}"
            data = data.get(key)
    return path.removeprefix(".")


def printable(name: str) -> str:
    """A client's own word, fit for a header and a message."""
    return "".join(char if 32 < ord(char) < 127 else "?" for char in name[:_MAX_NAME])
