"""What a batch is: its description on disk, the lines of its input, and the lines that come out. No running here, and no loop.

Blocks where it reads files. `batches` runs them.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from service.jobs.disk import LineLog

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
ENDED: frozenset[Status] = frozenset({"failed", "completed", "expired", "cancelled"})
MAX_FAILURES = 20
_MAX_ID = 512


class Failure(msgspec.Struct, frozen=True):
    """Why a batch could not run. line: of the input, counted from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Batch(msgspec.Struct):
    """ending: how the batch will end, once that is decided; from then on nothing of it is run any more. times: when each status was
    reached, in Unix seconds. output_lifetime_s: how long its files are kept, None for ever."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    metadata: dict[str, str] | None = None
    output_lifetime_s: int | None = None
    status: Status = "validating"
    ending: Status | None = None
    times: dict[str, int] = {}
    errors: list[Failure] = []
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended: status and body of its answer. retry_after_s: when it may be sent again, if the answer said so."""

    status: int
    request_id: str
    body: bytes
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request stands in the input."""

    custom_id: str
    start: int
    num_bytes: int


class _Line(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


@dataclass(frozen=True, slots=True)
class LineLimits:
    max_lines: int = 50_000
    max_line_bytes: int = 32 * 2**20


def survey(path: Path, endpoint: str, limits: LineLimits) -> tuple[list[Place], list[Failure]]:
    """The requests of an input, or what is wrong with it, at most MAX_FAILURES of it. Raises: OSError."""
    places: list[Place] = []
    failures: list[Failure] = []
    seen: set[str] = set()
    start = 0
    for number, line in enumerate(_lines(path, limits.max_line_bytes), 1):
        try:
            if line.strip():
                custom_id = _check_line(line, endpoint, seen, limits)
                places.append(Place(custom_id, start, len(line)))
                if len(places) > limits.max_lines:
                    raise _Bad("too_many_requests", f"a batch has at most {limits.max_lines} requests")
        except _Bad as bad:
            failures.append(Failure(bad.code, bad.message, bad.param, number))
            if len(failures) >= MAX_FAILURES or bad.code == "too_many_requests":
                break
        start += len(line)
    if not places and not failures:
        failures.append(Failure("empty_file", "the input file has no requests"))
    return places, failures


def _lines(path: Path, most: int) -> Iterator[bytes]:
    """Each with its newline. One that is too long comes in part, which its check refuses, and is the last."""
    with open(path, "rb") as lines:
        while line := lines.readline(most + 2):
            yield line
            if len(line) > most and not line.endswith(b"\n"):
                return


class _Bad(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        self.code = code
        self.message = message
        self.param = param


def _check_line(line: bytes, endpoint: str, seen: set[str], limits: LineLimits) -> str:
    """The line's custom_id. Mutates: seen. Raises: _Bad."""
    if len(line.rstrip(b"\r\n")) > limits.max_line_bytes:
        raise _Bad("line_too_long", f"a line has at most {limits.max_line_bytes} bytes")
    try:
        wanted = msgspec.json.decode(line, type=_Line)
        body = msgspec.json.decode(wanted.body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _Bad("invalid_json_line", f"this line is not a batch request: {error}") from None
    if not 0 < len(wanted.custom_id) <= _MAX_ID:
        raise _Bad("invalid_custom_id", f"custom_id must have 1 to {_MAX_ID} characters", "custom_id")
    if wanted.custom_id in seen:
        raise _Bad("duplicate_custom_id", "the custom_id of this line stands on a line before it", "custom_id")
    if wanted.method != "POST":
        raise _Bad("invalid_method", "method must be POST", "method")
    if wanted.url != endpoint:
        raise _Bad("mismatched_endpoint", f"url must be the batch's endpoint, {endpoint}", "url")
    if bytes(body.get("stream", b"false")) == b"true":
        raise _Bad("unsupported_parameter", "the answers of a batch can't be streamed", "body.stream")
    if bytes(body.get("background", b"false")) == b"true":
        raise _Bad("unsupported_parameter", "a batch is in the background already", "body.background")
    seen.add(wanted.custom_id)
    return wanted.custom_id


def body_at(path: Path, place: Place) -> bytes:
    """The request's body. Raises: OSError; msgspec.DecodeError when the file is no longer what was surveyed."""
    with open(path, "rb") as lines:
        lines.seek(place.start)
        return bytes(msgspec.json.decode(lines.read(place.num_bytes), type=_Line).body)


@dataclass(frozen=True, slots=True)
class Record:
    """One line of what comes out."""

    custom_id: str
    is_failed: bool
    line: bytes


def answered(place: Place, outcome: Outcome) -> Record:
    try:
        body = msgspec.Raw(outcome.body) if msgspec.json.decode(outcome.body) is not None else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        body = None
    response = {"status_code": outcome.status, "request_id": outcome.request_id, "body": body}
    return _record(place.custom_id, response, None, outcome.status != 200)


def unanswered(place: Place, code: str, message: str) -> Record:
    return _record(place.custom_id, None, {"code": code, "message": message}, True)


def _record(custom_id: str, response: object, error: object, is_failed: bool) -> Record:
    line = {"id": f"batch_req_{secrets.token_hex(16)}", "custom_id": custom_id, "response": response, "error": error}
    return Record(custom_id, is_failed, msgspec.json.encode(line))


class _Known(msgspec.Struct):
    custom_id: str


class Progress:
    """What a batch has answered, in two growing files, so that nothing is run twice that was once finished. Safe among threads."""

    def __init__(self, outputs: Path, errors: Path) -> None:
        """Raises: OSError."""
        self._lock = threading.Lock()
        self._outputs = LineLog(outputs)
        self._errors = LineLog(errors)
        completed = list(_ids(self._outputs.lines()))
        failed = list(_ids(self._errors.lines()))
        self.done = {*completed, *failed}
        self.num_completed = len(completed)
        self.num_failed = len(failed)

    def append(self, records: Iterable[Record]) -> None:
        """On disk when this returns, but for what has an answer already: a line may be answered while another thread finds that its time is
        over. Raises: OSError; then what is not in `done` is not on disk either."""
        with self._lock:
            records = [record for record in records if record.custom_id not in self.done]
            good = [record for record in records if not record.is_failed]
            bad = [record for record in records if record.is_failed]
            self._outputs.append([record.line for record in good])
            self.done.update(record.custom_id for record in good)
            self.num_completed += len(good)
            self._errors.append([record.line for record in bad])
            self.done.update(record.custom_id for record in bad)
            self.num_failed += len(bad)

    def close(self) -> None:
        with self._lock:
            self._outputs.close()
            self._errors.close()


def _ids(lines: Iterable[bytes]) -> Iterator[str]:
    return (msgspec.json.decode(line, type=_Known).custom_id for line in lines)
