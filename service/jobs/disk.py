"""Writing that survives a crash: whole small files by renaming, and lines appended in groups. Plain file calls, nothing else.

Blocks; callers on an event loop use threads. Used by the file store and the batches.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_READ = 1 << 20


def write_whole(path: Path, data: bytes) -> None:
    """The file is afterwards either as it was or as given, whatever happens in between. Raises: OSError."""
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb", opener=_private) as out:
            out.write(data)
            sync(out.fileno())
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync(descriptor: int) -> None:
    """Data only, where the system can tell it from the times of the file."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes names in a folder last. Raises: OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class LineLog:
    """A file of lines that only grows. What a crash or a full disk left of a line is cut off before anything else is written."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file, and mends its end. Raises: OSError."""
        self.path = path
        self._file = open(path, "a+b", buffering=0, opener=_private)  # noqa: SIM115  # lives as long as the log
        self._size = _whole_lines(self._file.fileno())
        os.ftruncate(self._file.fileno(), self._size)

    def append(self, lines: list[bytes]) -> None:
        """All of them, on disk when this returns; none of them when it raises. Each without its newline. Raises: OSError."""
        if not lines:
            return
        data = b"".join(line + b"\n" for line in lines)
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
            sync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), self._size)
            raise
        self._size += len(data)

    def lines(self) -> Iterator[bytes]:
        with open(self.path, "rb") as lines:
            yield from lines

    def close(self) -> None:
        self._file.close()


def _whole_lines(descriptor: int) -> int:
    """Bytes up to and with the last newline."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - _READ)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
