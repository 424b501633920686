"""Batches that run: each from its validation to its end, with a bounded number of requests under way, through restarts.

Owns the batches' folder. Knows no HTTP: how one request is answered is handed to `start`. Called by the API and the composition root.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from service.errors import NotFoundError, OverloadedError, RequestError
from service.jobs.answering import Answering, Execute
from service.jobs.batch import ENDED, Batch, Failure, LineLimits, Progress, Status, survey, unanswered
from service.jobs.disk import write_whole
from service.jobs.files import FileStore, StoredFile, new_id, shown, storage_error

log = logging.getLogger("braid.jobs")

WINDOW_S = 24 * 3600
MAX_ACTIVE = 16
MAX_UNFINISHED = 256
MAX_KEPT = 10_000
_ID = re.compile(r"batch_[0-9a-f]{32}")


class Batches:
    """All batches of a folder. concurrency: requests of all batches together that are under way. clock: in Unix seconds."""

    def __init__(
        self,
        folder: Path,
        files: FileStore,
        *,
        concurrency: int = 8,
        limits: LineLimits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises: OSError when the folder can't be made or read."""
        self._folder = folder
        self._files = files
        self._limits = limits or LineLimits()
        self._clock = clock
        self._execute: Execute | None = None
        self._running: dict[str, _Run] = {}
        self._requests = asyncio.Semaphore(concurrency)
        self._active = asyncio.Semaphore(MAX_ACTIVE)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._batches = {batch.id: batch for path in sorted(folder.glob("batch_*.json")) if (batch := _read(path)) is not None}
        for draft in folder.glob("*.tmp"):
            draft.unlink(missing_ok=True)

    def start(self, execute: Execute) -> None:
        """Goes on with what is unfinished, and runs what comes from now on."""
        self._execute = execute
        for batch in self._sorted():
            if batch.status not in ENDED:
                self._launch(batch)

    async def stop(self) -> None:
        """Leaves every batch as it is on disk; another start goes on there."""
        self._execute = None
        runs = list(self._running.values())
        for run in runs:
            run.task.cancel()
        await asyncio.gather(*(run.task for run in runs), return_exceptions=True)

    def get(self, tenant: str, batch_id: str) -> Batch:
        """Raises: NotFoundError, also for another tenant's batch."""
        batch = self._batches.get(batch_id)
        if batch is None or batch.tenant != tenant:
            raise NotFoundError(f"There is no batch with the id {shown(batch_id)!r}.", param="id")
        return batch

    def of_tenant(self, tenant: str) -> list[Batch]:
        """The oldest first."""
        return [batch for batch in self._sorted() if batch.tenant == tenant]

    def uses(self, file_id: str) -> bool:
        """Does a batch that has not ended read this file?"""
        return any(batch.input_file_id == file_id and batch.status not in ENDED for batch in self._batches.values())

    def output_ids(self) -> set[str]:
        """Of the files that batches have made or are about to make."""
        return {name for batch in self._batches.values() for name in (batch.output_file_id, batch.error_file_id) if name is not None}

    async def create(
        self, source: StoredFile, endpoint: str, *, metadata: dict[str, str] | None = None, output_lifetime_s: int | None = None
    ) -> Batch:
        """Raises: RequestError for a file that was not brought for this; OverloadedError; StorageError."""
        if source.purpose != "batch":
            raise RequestError(f"the input file's purpose is {source.purpose}; it must be batch", param="input_file_id")
        if sum(batch.status not in ENDED and batch.tenant == source.tenant for batch in self._batches.values()) >= MAX_UNFINISHED:
            raise OverloadedError(f"there are {MAX_UNFINISHED} batches under way already", retry_after_s=60.0)
        now = int(self._clock())
        batch = Batch(
            new_id("batch_"),
            source.tenant,
            endpoint,
            source.id,
            "24h",
            now,
            now + WINDOW_S,
            metadata=metadata,
            output_lifetime_s=output_lifetime_s,
        )
        try:
            await self._save(batch)
        except OSError as error:
            raise storage_error(error) from error
        self._batches[batch.id] = batch
        self._launch(batch)
        self._forget_old()
        return batch

    async def cancel(self, batch: Batch) -> None:
        """What was answered stays. Raises: RequestError when it is too late; StorageError. Mutates: batch."""
        if batch.status in ("cancelling", "cancelled"):
            return
        if batch.status not in ("validating", "in_progress") or batch.ending is not None:
            raise RequestError(f"a batch with the status {batch.status} can't be cancelled", param="id")
        batch.ending = "cancelled"
        self._reach(batch, "cancelling")
        try:
            await self._save(batch)
        except OSError as error:
            raise storage_error(error) from error
        finally:
            if (run := self._running.get(batch.id)) is not None:
                run.is_over.set()

    def _sorted(self) -> list[Batch]:
        return sorted(self._batches.values(), key=lambda batch: (batch.created_at, batch.id))

    def _forget_old(self) -> None:
        ended = [batch for batch in self._sorted() if batch.status in ENDED]
        for batch in ended[: max(0, len(self._batches) - MAX_KEPT)]:
            del self._batches[batch.id]
            self._path(batch, "json").unlink(missing_ok=True)

    def _launch(self, batch: Batch) -> None:
        if self._execute is not None and batch.id not in self._running:
            run = _Run()
            run.task = asyncio.create_task(self._run(batch, self._execute, run.is_over), name=batch.id)
            self._running[batch.id] = run
            run.task.add_done_callback(lambda _: self._running.pop(batch.id, None))

    async def _run(self, batch: Batch, execute: Execute, is_over: asyncio.Event) -> None:
        """Until the batch has ended, well or badly; only being stopped leaves it as it is."""
        try:
            if batch.ending is None:
                await self._in_turn(batch, execute, is_over)
            await self._finish(batch)
        except Exception as error:
            log.exception("%s can't go on", batch.id)
            batch.errors = [_failure(error)]
            batch.ending = "failed"
            with contextlib.suppress(OSError):
                await self._finish(batch)
            self._reach(batch, "failed")

    async def _in_turn(self, batch: Batch, execute: Execute, is_over: asyncio.Event) -> None:
        """Works on the batch when its turn has come. Decides how the batch ends. Raises: OSError, NotFoundError."""
        turn = asyncio.create_task(self._active.acquire())
        if not await _until(turn, is_over, batch.expires_at - self._clock()):
            batch.ending = batch.ending or "expired"
            return
        try:
            if batch.ending is None:
                await self._work(batch, execute, is_over)
        finally:
            self._active.release()

    async def _work(self, batch: Batch, execute: Execute, is_over: asyncio.Event) -> None:
        """Decides how the batch ends. Raises: OSError, NotFoundError."""
        source = self._files.path(self._files.get(batch.tenant, batch.input_file_id))
        places, batch.errors = await asyncio.to_thread(survey, source, batch.endpoint, self._limits)
        if batch.ending is not None:
            return
        if batch.errors:
            batch.ending = "failed"
            return
        progress = await asyncio.to_thread(Progress, self._path(batch, "outputs"), self._path(batch, "errors"))
        batch.total = len(places)
        self._count(batch, progress)
        if batch.status == "validating":
            self._reach(batch, "in_progress")
            await self._save(batch)
        answering = asyncio.create_task(Answering(batch, source, progress, execute, self._requests, self._count).run(places))
        try:
            is_done = await _until(answering, is_over, batch.expires_at - self._clock())
            if not is_done and batch.ending is None:
                why = "The request was not answered before the batch's time was over."
                late = [unanswered(place, "batch_expired", why) for place in places if place.custom_id not in progress.done]
                await asyncio.to_thread(progress.append, late)
                batch.ending = "expired"
            elif batch.ending is None:
                batch.ending = "completed"
        finally:
            progress.close()
            self._count(batch, progress)

    async def _finish(self, batch: Batch) -> None:
        """Every step may have been done before a crash already. Raises: OSError."""
        ending = batch.ending or "failed"
        parts = {"output": self._path(batch, "outputs"), "error": self._path(batch, "errors")}
        if batch.output_file_id is None and _has_lines(parts["output"]):
            batch.output_file_id = new_id("file-")
        if batch.error_file_id is None and _has_lines(parts["error"]):
            batch.error_file_id = new_id("file-")
        if ending == "completed":
            self._reach(batch, "finalizing")
        await self._save(batch)
        for kind, file_id in (("output", batch.output_file_id), ("error", batch.error_file_id)):
            if file_id is not None:
                await asyncio.to_thread(
                    self._files.adopt,
                    file_id,
                    parts[kind],
                    tenant=batch.tenant,
                    filename=f"{batch.id}_{kind}.jsonl",
                    purpose="batch_output",
                    lifetime_s=batch.output_lifetime_s,
                )
        self._reach(batch, ending)
        await self._save(batch)
        for part in parts.values():
            part.unlink(missing_ok=True)
        log.info("%s: %s, %d of %d answered, %d failed", batch.id, ending, batch.completed, batch.total, batch.failed)

    def _count(self, batch: Batch, progress: Progress) -> None:
        batch.completed = progress.num_completed
        batch.failed = progress.num_failed

    def _reach(self, batch: Batch, status: Status) -> None:
        batch.status = status
        batch.times.setdefault(f"{status}_at", int(self._clock()))

    async def _save(self, batch: Batch) -> None:
        await asyncio.to_thread(write_whole, self._path(batch, "json"), msgspec.json.encode(batch))

    def _path(self, batch: Batch, kind: str) -> Path:
        return self._folder / f"{batch.id}.{kind}"


class _Run:
    """is_over: set to end the work before it is done."""

    def __init__(self) -> None:
        self.is_over = asyncio.Event()
        self.task: asyncio.Task[None]


def _failure(error: Exception) -> Failure:
    if isinstance(error, NotFoundError):
        return Failure("invalid_input_file", "the input file is gone", "input_file_id")
    if isinstance(error, OSError):
        return Failure("storage_error", "the server's data folder is full or broken")
    return Failure("server_error", "the server had an error")


async def _until(task: asyncio.Task[Any], is_over: asyncio.Event, timeout_s: float) -> bool:
    """Was the task done in time? If not, it is ended. Raises: what the task raises."""
    over = asyncio.create_task(is_over.wait())
    try:
        await asyncio.wait({task, over}, timeout=max(timeout_s, 0.0), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        over.cancel()
        task.cancel()
        await asyncio.wait({task, over})
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("ended with %r", error)


def _has_lines(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _read(path: Path) -> Batch | None:
    try:
        batch = msgspec.json.decode(path.read_bytes(), type=Batch)
        if batch.id != path.stem or not _ID.fullmatch(batch.id):
            raise ValueError("it describes another batch")
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        log.warning("the description %s is not used: %s", path.name, error)
        return None
    return batch
