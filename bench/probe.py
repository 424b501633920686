"""What this machine can do at best, measured in the same run as what Braid does: read bandwidth, arithmetic, and who the machine is."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch


def read_bandwidth(num_bytes: int = 256 * 2**20, repeats: int = 12) -> float:
    """Bytes per second of reading memory with all cores: the best of several sums over an array far larger than the caches."""
    data = torch.ones(num_bytes // 4, dtype=torch.float32)
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum()
        best = max(best, num_bytes / (time.perf_counter() - start))
    return best


def arithmetic_rate(repeats: int = 40) -> float:
    """Operations (a product and its sum are two) a second of float32 matrix products with all cores: the best of several of a small
    model's size."""
    rows, inner, columns = 512, 576, 3072
    left, right = torch.ones(rows, inner), torch.ones(inner, columns)
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        left @ right
        best = max(best, 2 * rows * inner * columns / (time.perf_counter() - start))
    return best


def int8_rate(float_rate: float) -> float:
    """What int8 products could reach beside that rate of float32 products: four times as many.

    A nominal rate: an instruction that multiplies bytes (vpdpbusd) does four products and sums in the place of one of float32, through the
    same ports. Our own products, at their best, would be no fair limit. A processor without that instruction needs three others for it and
    can reach a third; `float_rate` is what PyTorch gets out of the machine, and so at most some percent too low.
    """
    return 4 * float_rate


def commit_of_tree() -> str:
    """By git, or where the tree is a copy without it by BRAID_COMMIT, or "unknown"."""
    try:
        run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        found = run.stdout.strip()
    except OSError:  # no git here
        found = ""
    return found or os.environ.get("BRAID_COMMIT", "") or "unknown"


def describe_machine() -> dict[str, Any]:
    """Processor, cores and versions, and the commit of the tree that is measured."""
    processor = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit_of_tree(),
    }
