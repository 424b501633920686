"""How much memory this machine, or the container it runs in, has left. Stdlib only; used by the engine and by `braid plan`."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(mapped_bytes: int = 0) -> int:
    """Bytes that can be taken without swapping: the kernel's estimate, or the container's limit where that is less. mapped_bytes: of files
    that are mapped and must stay in memory, which the kernel takes for available and the container for used."""
    return min(max(_system_available() - mapped_bytes, 0), _container_left())


def _system_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _container_left() -> int:
    """Of a version 2 control group; very large when there is no limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return 2**62
    return 2**62 if limit == "max" else max(int(limit) - used, 0)


def give_memory_back() -> None:
    """What loading needed beside the weights goes back to the system: 300 MB of 800 for SmolLM2 in int8, in 40 ms."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)
