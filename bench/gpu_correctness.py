"""Part of `bench.gpu`: every kernel case on the device, by the same checks as the tests: the 2 x rule against float64, guard rows.

What passes whole goes into verified.json. To add a kernel, add its line to CHECKS.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from bench.gpu_clock import Clock
from bench.gpu_score import Step
from kernels.attention import cases as attention_cases
from kernels.gated import cases as gated_cases
from kernels.kv_write import cases as kv_write_cases
from kernels.linear import cases as linear_cases
from kernels.norm import cases as norm_cases
from kernels.sample import cases as sample_cases
from tests.kernels import checks

BOTH = (torch.bfloat16, torch.float32)
# Kernel: its cases, what checks one, and the types it is checked in; none where it has but one.
CHECKS: dict[str, tuple[Any, Callable[..., None], tuple[torch.dtype, ...]]] = {
    "attention": (attention_cases.CASES, checks.check_attention, BOTH),
    "kv_write": (kv_write_cases.CASES, checks.check_kv_write, BOTH),
    "norm": (norm_cases.CASES, checks.check_norm, BOTH),
    "gated": (gated_cases.CASES, checks.check_gated, BOTH),
    "linear": (linear_cases.CASES, checks.check_linear, BOTH),
    "sample": (sample_cases.CASES, checks.check_sample, ()),
}


def steps(clock: Clock) -> list[Step]:
    """The small cases of every kernel first, then the large ones, so that a short budget still covers all kernels. In a tiny run two cases
    of each: the others are the interpreter tests'."""
    found: list[Step] = []
    for sizes in clock.sized((("tiny", "small"), ("huge",)), (("tiny",),)):
        for kernel, (cases, check, dtypes) in CHECKS.items():
            fitting = [case for case in cases if case.size in sizes]
            for case in clock.sized(fitting, fitting[:2]):
                for dtype in clock.sized(dtypes, dtypes[-1:]) or (None,):
                    name = f"{kernel}/{case.name}" + ("" if dtype is None else f"/{str(dtype).removeprefix('torch.')}")
                    found.append(({"case": name, "kernel": kernel}, partial(passes, clock, check, case, dtype)))
    return found


def passes(clock: Clock, check: Callable[..., None], case: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        check(case, *([] if dtype is None else [dtype]), clock.device.type, patch)
        clock.synchronize()
    return {"passes": True}
