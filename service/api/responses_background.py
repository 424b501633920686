"""Responses that run to their end without a client: the log of their events, readers that come and go, and cancelling.

No schema and no store of its own. Called by the Responses routes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence

from service.api.generation import Generation
from service.api.responses_shape import ResponseAnswer
from service.api.responses_store import Item
from service.api.sse import KEEP_ALIVE_S
from service.errors import BraidError, EngineError, OverloadedError

log = logging.getLogger("braid.http")

PING = b": ping\n\n"


class Job:
    """One response that runs. inputs: what it answers to. events: its log, where one is kept; an event's place is its sequence number.
    num_bytes: of the log."""

    def __init__(self, answer: ResponseAnswer, generation: Generation, inputs: tuple[Item, ...], *, has_log: bool) -> None:
        self.answer = answer
        self.inputs = inputs
        self.events: list[bytes] = []
        self.num_bytes = 0
        self.is_deleted = False
        self._generation = generation
        self._has_log = has_log
        self._changed = asyncio.Event()
        self._add(answer.queued())

    def cancel(self) -> None:
        """What was said until now stays. Mutates: the job, which is over for its readers."""
        if not self.answer.is_over:
            self._add(self.answer.cancelled())
            self._generation.abort()

    async def run(self) -> None:
        """Until the generation has ended. Mutates: the job."""
        answer = self.answer
        try:
            async for pieces in self._generation.pieces():
                if answer.is_over:
                    continue
                if answer.status == "queued":
                    self._add(answer.opening())
                self._add(b"".join(map(answer.chunk, pieces)))
            if not answer.is_over:
                self._add(answer.closing())
        except BraidError as error:
            self._fail(error)
        except Exception:
            log.exception("a response in the background failed")
            self._fail(EngineError("The server had an error while it worked on this request."))

    def _fail(self, error: BraidError) -> None:
        if not self.answer.is_over:
            self._add(self.answer.failure(error))

    def _add(self, data: bytes) -> None:
        if self._has_log and data:
            self.events += split(data)
            self.num_bytes += len(data)
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self, start: int) -> AsyncGenerator[bytes, None]:
        """Events from the sequence number `start` on, as they come, and a comment after each silence."""
        while True:
            changed = self._changed
            if start < len(self.events):
                yield b"".join(self.events[start:])
                start = len(self.events)
            elif self.answer.is_over:
                return
            else:
                try:
                    await asyncio.wait_for(changed.wait(), KEEP_ALIVE_S)
                except TimeoutError:
                    yield PING


class Background:
    """Jobs by tenant and id. keep: called with each that has ended, unless it was deleted. max_log_bytes: of all logs together,
    beyond which no new job with a log begins."""

    def __init__(self, keep: Callable[[str, Job], None], max_log_bytes: int) -> None:
        self._keep = keep
        self._max_log_bytes = max_log_bytes
        self._jobs: dict[tuple[str, str], Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def check_room(self) -> None:
        """Raises: OverloadedError."""
        if sum(job.num_bytes for job in self._jobs.values()) >= self._max_log_bytes:
            raise OverloadedError("too much is being streamed in the background at the moment", retry_after_s=5.0)

    def start(self, tenant: str, job: Job) -> None:
        self._jobs[tenant, job.answer.id] = job
        task = asyncio.get_running_loop().create_task(self._run(tenant, job), name=job.answer.id)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, tenant: str, job: Job) -> None:
        try:
            await job.run()
            if not job.is_deleted:
                self._keep(tenant, job)
        finally:
            self._jobs.pop((tenant, job.answer.id), None)

    def get(self, tenant: str, response_id: str) -> Job | None:
        job = self._jobs.get((tenant, response_id))
        return None if job is None or job.is_deleted else job

    def delete(self, tenant: str, response_id: str) -> bool:
        """Was it running? Then it no longer is. Mutates: the job."""
        job = self.get(tenant, response_id)
        if job is None:
            return False
        job.is_deleted = True
        job.cancel()
        return True


def split(data: bytes) -> list[bytes]:
    """Several server-sent events, one by one. JSON on one line has no empty line in it."""
    return [each + b"\n\n" for each in data.split(b"\n\n") if each]


async def replay(events: Sequence[bytes], start: int) -> AsyncGenerator[bytes, None]:
    """The log of a response that has ended."""
    if rest := b"".join(events[start:]):
        yield rest
