"""The data folder as a whole: files and batches, opened together and owned by one server at a time.

Called by the composition root, and by tests.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import filelock

from service.jobs.batch import LineLimits
from service.jobs.batches import Batches
from service.jobs.files import FileStore

log = logging.getLogger("braid.jobs")


@dataclass(frozen=True, slots=True)
class Desk:
    """lock: held as long as the server lives."""

    files: FileStore
    batches: Batches
    lock: filelock.BaseFileLock

    async def close(self) -> None:
        """Ends what runs, leaves it resumable, and lets another server have the folder."""
        await self.batches.stop()
        self.lock.release()


def open_desk(
    folder: Path, *, max_file_bytes: int, max_total_bytes: int, max_line_bytes: int = 32 * 2**20, concurrency: int = 8
) -> Desk | None:
    """None, and a warning in the log, when the folder can't be used; the server does without files and batches then."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / "lock", timeout=0, mode=0o600, thread_local=False)
        lock.acquire()
        files = FileStore(folder / "files", max_file_bytes=max_file_bytes, max_total_bytes=max_total_bytes)
        batches = Batches(folder / "batches", files, concurrency=concurrency, limits=LineLimits(max_line_bytes=max_line_bytes))
        files.sweep(keep=batches.output_ids())
    except filelock.Timeout:
        log.warning("files and batches are off: another server uses %s", folder)
        return None
    except OSError as error:
        log.warning("files and batches are off: %s can't be used: %s", folder, error.strerror)
        return None
    return Desk(files, batches, lock)
