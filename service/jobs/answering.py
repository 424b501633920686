"""The requests of one batch on their way to the server: a bounded number at once, asked again while it is full, written as they end.

Knows no HTTP and no status of a batch. Called by `batches`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from service.jobs.batch import Batch, Outcome, Place, Progress, Record, answered, body_at, unanswered

log = logging.getLogger("braid.jobs")

Execute = Callable[[str, str, bytes], Awaitable[Outcome]]  # (tenant, path, body)

_BUSY = (429, 503)
_LONGEST_WAIT_S = 30.0


class Answering:
    """The requests of one batch, as many at once as `slots` lets; the batches take turns at it. count: told after every write."""

    def __init__(
        self,
        batch: Batch,
        source: Path,
        progress: Progress,
        execute: Execute,
        slots: asyncio.Semaphore,
        count: Callable[[Batch, Progress], None],
    ) -> None:
        self._batch = batch
        self._source = source
        self._progress = progress
        self._execute = execute
        self._slots = slots
        self._count = count
        self._records: asyncio.Queue[Record | None] = asyncio.Queue(maxsize=64)

    async def run(self, places: list[Place]) -> None:
        """All that are not done. Raises: OSError."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write())
                async with asyncio.TaskGroup() as requests:
                    for place in places:
                        if place.custom_id not in self._progress.done:
                            await self._slots.acquire()
                            # Not inside the task: one that is cancelled before it begins never comes to its end.
                            requests.create_task(self._answer(place)).add_done_callback(lambda _: self._slots.release())
                await self._records.put(None)
        except* OSError as errors:
            raise errors.exceptions[0] from None

    async def _answer(self, place: Place) -> None:
        try:
            body = await asyncio.to_thread(body_at, self._source, place)
            record = answered(place, await self._insist(body))
        except OSError:
            raise
        except Exception:
            log.exception("a request of %s failed", self._batch.id)
            record = unanswered(place, "server_error", "The server had an error while it worked on this request.")
        await self._records.put(record)

    async def _insist(self, body: bytes) -> Outcome:
        """Asks until the server has room."""
        wait_s = 0.25
        while True:
            outcome = await self._execute(self._batch.tenant, self._batch.endpoint, body)
            if outcome.status not in _BUSY:
                return outcome
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            await asyncio.sleep(min(max(wait_s, outcome.retry_after_s or 0.0), _LONGEST_WAIT_S))

    async def _write(self) -> None:
        """Writes together what has come while the last write went on: one wait for the disk, however many answers."""
        is_last = False
        while not is_last:
            records = [await self._records.get()]
            while not self._records.empty():
                records.append(self._records.get_nowait())
            is_last = records[-1] is None
            await asyncio.to_thread(self._progress.append, [record for record in records if record is not None])
            self._count(self._batch, self._progress)
