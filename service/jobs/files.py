"""Clients' files in a folder: their bytes, and beside them what is known about them. Each belongs to the tenant that brought it.

Names from clients are data and never paths: a file's path is made of an id of ours. Blocks; the API calls it from threads.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO

import msgspec

from service.errors import BodyTooLargeError, NotFoundError, StorageError
from service.jobs.disk import sync, sync_folder, write_whole

log = logging.getLogger("braid.jobs")

_ID = re.compile(r"file-[0-9a-f]{32}")
_COPY = 1 << 20
MAX_FILES = 10_000


class StoredFile(msgspec.Struct, frozen=True):
    """expires_at: in Unix seconds, None for never."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None = None


class FileStore:
    """All files under one folder. max_file_bytes: of one; max_total_bytes: of all together, what batches write included, which is
    never refused. clock: in Unix seconds."""

    def __init__(self, folder: Path, *, max_file_bytes: int, max_total_bytes: int, clock: Callable[[], float] = time.time) -> None:
        """Raises: OSError when the folder can't be made or read."""
        self.max_file_bytes = max_file_bytes
        self._max_total_bytes = max_total_bytes
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._files = {file.id: file for path in sorted(folder.glob("file-*.json")) if (file := _read(path)) is not None}
        for draft in folder.glob("*.tmp"):
            draft.unlink(missing_ok=True)

    def sweep(self, keep: Collection[str] = ()) -> None:
        """Deletes bytes without a description, which a crash left behind, but for the ids in keep; and expired files."""
        for path in self._folder.glob("file-*.data"):
            if path.stem not in self._files and path.stem not in keep:
                path.unlink(missing_ok=True)
        self._drop_expired()

    def create(self, source: BinaryIO, *, tenant: str, filename: str, purpose: str, lifetime_s: int | None = None) -> StoredFile:
        """Copies source from where it stands. Raises: BodyTooLargeError, StorageError."""
        if len(self._files) >= MAX_FILES:
            raise StorageError(f"there are {MAX_FILES} files already: delete some first", code="storage_full")
        file_id = new_id("file-")
        draft = self._folder / f"{file_id}.tmp"
        try:
            size = self._copy(source, draft)
            os.replace(draft, self._data(file_id))
            return self._describe(file_id, tenant, filename, purpose, size, lifetime_s)
        except OSError as error:
            raise storage_error(error) from error
        finally:
            draft.unlink(missing_ok=True)

    def _copy(self, source: BinaryIO, draft: Path) -> int:
        size = 0
        room = self._max_total_bytes - self.num_bytes()
        with open(draft, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as out:
            while chunk := source.read(_COPY):
                size += len(chunk)
                if size > self.max_file_bytes:
                    raise BodyTooLargeError(f"the file is larger than {self.max_file_bytes} bytes, which is the limit", param="file")
                if size > room:
                    raise StorageError("there is no room for this file: delete some first", code="storage_full")
                out.write(chunk)
            out.flush()
            sync(out.fileno())
        return size

    def adopt(self, file_id: str, path: Path, *, tenant: str, filename: str, purpose: str, lifetime_s: int | None = None) -> None:
        """Takes a finished file of ours in under an id made before. May be called again after a crash. Raises: OSError."""
        if path.exists():
            os.replace(path, self._data(file_id))
            sync_folder(self._folder)
        if file_id not in self._files:
            self._describe(file_id, tenant, filename, purpose, self._data(file_id).stat().st_size, lifetime_s)

    def _describe(self, file_id: str, tenant: str, filename: str, purpose: str, size: int, lifetime_s: int | None) -> StoredFile:
        created_at = int(self._clock())
        file = StoredFile(file_id, tenant, filename, purpose, size, created_at, None if lifetime_s is None else created_at + lifetime_s)
        write_whole(self._folder / f"{file_id}.json", msgspec.json.encode(file))
        with self._lock:
            self._files[file_id] = file
        return file

    def get(self, tenant: str, file_id: str, param: str = "id") -> StoredFile:
        """Raises: NotFoundError, also for a file of another tenant."""
        file = self._files.get(file_id)
        if file is None or file.tenant != tenant or self._is_expired(file):
            raise NotFoundError(f"There is no file with the id {shown(file_id)!r}.", param=param)
        return file

    def of_tenant(self, tenant: str, purpose: str | None = None) -> list[StoredFile]:
        """The oldest first."""
        self._drop_expired()
        with self._lock:
            found = [file for file in self._files.values() if file.tenant == tenant and purpose in (None, file.purpose)]
        return sorted(found, key=lambda file: (file.created_at, file.id))

    def path(self, file: StoredFile) -> Path:
        """Where the bytes are."""
        return self._data(file.id)

    def delete(self, file: StoredFile) -> None:
        """Raises: StorageError."""
        with self._lock:
            self._files.pop(file.id, None)
        try:
            # The description first: bytes alone are swept, a description alone would promise what is not there.
            (self._folder / f"{file.id}.json").unlink(missing_ok=True)
            self._data(file.id).unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error) from error

    def num_bytes(self) -> int:
        with self._lock:
            return sum(file.bytes for file in self._files.values())

    def _is_expired(self, file: StoredFile) -> bool:
        return file.expires_at is not None and file.expires_at <= self._clock()

    def _drop_expired(self) -> None:
        with self._lock:
            expired = [file for file in self._files.values() if self._is_expired(file)]
        for file in expired:
            self.delete(file)

    def _data(self, file_id: str) -> Path:
        if not _ID.fullmatch(file_id):
            raise ValueError("only ids of ours become paths")
        return self._folder / f"{file_id}.data"


def _read(path: Path) -> StoredFile | None:
    try:
        file = msgspec.json.decode(path.read_bytes(), type=StoredFile)
        if file.id != path.stem or not _ID.fullmatch(file.id):
            raise ValueError("it describes another file")
        if not path.with_suffix(".data").is_file():
            raise ValueError("its bytes are gone")
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        log.warning("the description %s is not used: %s", path.name, error)
        return None
    return file


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(16)


def shown(name: str) -> str:
    """A client's word, fit for a message."""
    return "".join(char if char.isprintable() else "?" for char in name[:64])


def storage_error(error: OSError) -> StorageError:
    """What went wrong, without the path."""
    log.error("the data folder: %s", error)
    return StorageError(f"the server can't store this: {os.strerror(error.errno) if error.errno else 'the disk failed'}")
