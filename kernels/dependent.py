"""Programmatic dependent launch: a kernel is started while the one before it still runs, and waits before it touches what that one wrote.

No formula here. Called by the Triton kernels of a decode step. The rules that keep it right:
 - A kernel that is launched with `launch_pdl=can_depend(device)` calls `begin` in *every* program, before it reads or writes anything
   that an earlier kernel wrote or reads. Only weights may be touched before. So when it ends, all before it have ended, and the wait of
   its successor covers the whole chain; one kernel that did not wait would break the chain for those behind it.
 - Successors are let in only behind the wait: never more than two kernels share the device, and what is resident is what runs next.
A kernel launched without it waits for all of its predecessor, as ever.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

IS_ON = True
"""A test and a benchmark turn it off, to compare; a captured graph keeps what it was captured with."""


def can_depend(device: torch.device) -> bool:
    """Whether kernels on this device are launched dependent: on Hopper (9.0) and later; never on the interpreter."""
    return IS_ON and _knows_dependence(device)


@cache
def _knows_dependence(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def begin(DEPENDENT: tl.constexpr):
    """Waits for everything that earlier kernels do, then lets the next kernel in."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(at, DEPENDENT: tl.constexpr):
    """Asks for the 128-byte lines at these pointers, which must be readable, to be brought into L2: for weights, before `begin`."""
    if DEPENDENT:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )
