"""Pictures that wait to be turned into codes, and codes that wait to be drawn: work that needs no K/V and keeps no sequence waiting.

A picture is a request of its own, so that in prompts and answers there are ids alone. One batch is out at a time and takes what has come
together meanwhile. Bytes and ints; no clock, no device. Used by `scheduler`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from service.scheduling.plan import PictureResult, PictureWork
from service.scheduling.sequence import Finish, Output, Usage

MAX_BATCH = 8
"""Pictures of a batch: a few, so that one that comes in meanwhile does not wait for long."""


@dataclass(frozen=True, slots=True)
class PictureRequest:
    """priority: smaller first. deadline: absolute, on the clock of every `now`."""

    work: PictureWork
    priority: int = 0
    deadline: float | None = None


@dataclass(eq=False, slots=True)
class _Entry:
    request: PictureRequest
    rank: tuple[int, int]
    arrived_at: float
    began_at: float | None = None


class PictureQueue:
    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._out: set[str] = set()  # of the batch that is being worked on, those that have ended included
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    @property
    def earliest_deadline(self) -> float:
        return min((each.request.deadline for each in self._entries.values() if each.request.deadline is not None), default=math.inf)

    def add(self, request: PictureRequest, now: float) -> None:
        """Its id must be new."""
        self._arrivals += 1
        self._entries[request.work.request_id] = _Entry(request, (request.priority, self._arrivals), now)

    def abort(self, request_id: str, finish: Finish, now: float) -> list[Output]:
        """Ends one, in whatever state; what still comes of it is dropped. An unknown one is no error."""
        entry = self._entries.pop(request_id, None)
        return [] if entry is None else [_ended(entry, finish, now)]

    def expire(self, now: float) -> list[Output]:
        late = [key for key, entry in self._entries.items() if entry.request.deadline is not None and entry.request.deadline <= now]
        return [output for key in late for output in self.abort(key, "deadline", now)]

    def take(self, now: float) -> tuple[PictureWork, ...]:
        """The next batch, the best rank first; nothing while one is out. Mutates: the queue."""
        if self._out or not self._entries:
            return ()
        chosen = sorted(self._entries.values(), key=lambda entry: entry.rank)[:MAX_BATCH]
        for entry in chosen:
            entry.began_at = now
        self._out = {entry.request.work.request_id for entry in chosen}
        return tuple(entry.request.work for entry in chosen)

    def commit(self, results: Iterable[PictureResult], now: float) -> list[Output]:
        """Some of the batch that is out are done."""
        outputs = []
        for result in results:
            self._out.discard(result.request_id)
            entry = self._entries.pop(result.request_id, None)
            if entry is not None:
                outputs.append(_ended(entry, "error" if result.is_failed else "stop", now, result))
        return outputs

    def check(self) -> None:
        """Raises: AssertionError."""
        if len(self._out) > MAX_BATCH or any((entry.began_at is not None) != (key in self._out) for key, entry in self._entries.items()):
            raise AssertionError("the pictures that are worked on are not those that were taken")


def _ended(entry: _Entry, finish: Finish, now: float, result: PictureResult | None = None) -> Output:
    began_at = now if entry.began_at is None else entry.began_at
    usage = Usage(0, 0, 0, began_at - entry.arrived_at, 0.0, now - began_at, 0)
    return Output(entry.request.work.request_id, 0, finish=finish, usage=usage, picture=result)
