"""What the tables of tiles ask of the chip at hand: how much shared memory a program may have.

No kernel and no choice here. Called by the wrappers whose stages follow from it.
"""

from __future__ import annotations

from functools import cache

import torch
from triton.runtime import driver

HOPPER_SHARED_BYTES = 227 * 1024


@cache
def shared_bytes(device: torch.device) -> int:
    """The most that Triton launches a program with: 227 KB on Hopper, 163 KB on sm_80, 99 KB on sm_86, sm_89 and sm_120. Without a GPU
    Hopper's, whose launches the tests then see."""
    if device.type != "cuda":
        return HOPPER_SHARED_BYTES
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])
