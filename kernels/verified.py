"""Which kernels passed and paid on which GPU: `verified.json` beside this file, {GPU name: {kernel: commit}}.

A kernel that the interpreter can't run, or that is right but may be slower than the one it replaces, is used only where it stands there.
Written by `bench.gpu` alone, after a check on that GPU; read once a process. No kernel and no choice here.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch

PATH = Path(__file__).with_name("verified.json")


@cache
def verified(device: torch.device) -> frozenset[str]:
    """Names of the kernels that stand in the file for this device; none for a CPU."""
    if device.type != "cuda":
        return frozenset()
    return frozenset(json.loads(PATH.read_text()).get(torch.cuda.get_device_name(device), {}))


def enter(gpu: str, kernel: str, commit: str | None, path: Path = PATH) -> None:
    """Puts a kernel into the file, or takes it out where commit is None. Mutates: the file, not what this process has read of it."""
    table = json.loads(path.read_text())
    kernels = table.setdefault(gpu, {})
    if commit is None:
        kernels.pop(kernel, None)
    else:
        kernels[kernel] = commit
    table = {name: dict(sorted(found.items())) for name, found in sorted(table.items()) if found}
    path.write_text(json.dumps(table, indent=1) + "\n")
