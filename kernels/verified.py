"""Which kernels passed and paid on which GPU: `verified.json` beside this file, {GPU name: {kernel: commit}}.

A kernel that the interpreter can't run, or that is right but may be slower than the one it replaces, is used only where it stands there,
as "folder/variant". Written by `bench.gpu` alone, after a check on that GPU; read once a process. No kernel and no choice here.
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
