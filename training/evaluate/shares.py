"""Shares with how sure they are, and what a run was measured on: the plain values that every part of an evaluation is made of.

No model and no data. Called by the parts of evaluation and by ablations.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

MACHINE = "machine.json"
"""In a stage's folder: the circumstances that it ended in."""
Z = 1.96
"""Of a normal distribution: 95 % lie within so many standard deviations."""


def wilson(num_right: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of which num_right of count were seen; (0, 1) of nothing. Source: Wilson 1927."""
    if not count:
        return 0.0, 1.0
    share, spread = num_right / count, Z * Z / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def share_of(hits: Iterable[bool]) -> dict[str, float]:
    """share, its interval (low, high), and n. NaN has no place in JSON: the share of nothing is 0, n tells."""
    found = [bool(hit) for hit in hits]
    low, high = wilson(sum(found), len(found))
    return {"share": sum(found) / len(found) if found else 0.0, "low": low, "high": high, "n": len(found)}


def evenly(count: int, most: int | None) -> list[int]:
    """At most so many of `count` places, evenly chosen, the first and the last among them; None for all."""
    if most is None or count <= most:
        return list(range(count))
    return [round(index * (count - 1) / max(most - 1, 1)) for index in range(most)]


def mean_of(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0


def digest_of(folder: Path) -> str:
    """SHA-256 over all weights in a folder and its subfolders: which model was measured."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def circumstances(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the commit that figures come from."""
    is_gpu = device.type == "cuda"
    return {
        "hardware": torch.cuda.get_device_name(device) if is_gpu else f"{_cpu_name()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """Of the checkout that this file lies in, with a mark when it was changed since; "unknown" outside one."""
    folder = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
