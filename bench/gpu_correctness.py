"""Part of `bench.gpu`: every kernel case on the device, by the same checks as the tests: the 2 x rule against float64, guard rows.

What passes whole goes into verified.json; a variant of attention also has to be faster somewhere (`gpu.verified_of`). To add a kernel, add
its line to CHECKS; what has checks of another form is found in the files `test_gpu_*.py`, see `gpu_tests`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from bench.gpu_clock import Clock, NotBuiltError
from bench.gpu_score import Step, found
from kernels.attention import cases as attention_cases
from kernels.attention import reference as attention_reference
from kernels.experts import cases as experts_cases
from kernels.gated import cases as gated_cases
from kernels.kv_write import cases as kv_write_cases
from kernels.linear import cases as linear_cases
from kernels.norm import cases as norm_cases
from kernels.ops import PagedKV
from kernels.sample import cases as sample_cases
from tests.kernels import checks
from tests.kernels.checks_experts import check_experts
from tests.kernels.rule import assert_earned

BOTH = (torch.bfloat16, torch.float32)
# Kernel: its cases, what checks one, and the types it is checked in; none where it has but one.
CHECKS: dict[str, tuple[Any, Callable[..., None], tuple[torch.dtype, ...]]] = {
    "attention": (attention_cases.CASES, checks.check_attention, BOTH),
    "kv_write": (kv_write_cases.CASES, checks.check_kv_write, BOTH),
    "norm": (norm_cases.CASES, checks.check_norm, BOTH),
    "gated": (gated_cases.CASES, checks.check_gated, BOTH),
    "linear": (linear_cases.CASES, checks.check_linear, BOTH),
    "experts": (experts_cases.CASES, check_experts, BOTH),
    "sample": (sample_cases.CASES, checks.check_sample, ()),
}


def steps(clock: Clock) -> list[Step]:
    """The small cases of every kernel first, then the large ones, so that a short budget still covers all kernels. In a tiny run two cases
    of each: the others are the interpreter tests'."""
    made: list[Step] = []
    for sizes in clock.sized((("tiny", "small"), ("huge",)), (("tiny",),)):
        for kernel, (cases, check, dtypes) in with_variants().items():
            fitting = [case for case in cases if case.size in sizes]
            for case in clock.sized(fitting, fitting[:2]):
                for dtype in clock.sized(dtypes, dtypes[-1:]) or (None,):
                    name = f"{kernel}/{case.name}" + ("" if dtype is None else f"/{str(dtype).removeprefix('torch.')}")
                    made.append(({"case": name, "kernel": kernel}, partial(passes, clock, check, case, dtype)))
    return made


def check_variant(name: str, case: Any, dtype: torch.dtype, device: str, _: pytest.MonkeyPatch) -> None:
    """A variant of attention where it takes the case, what stands in for it elsewhere."""
    q, kv = attention_cases.build(case, dtype, device)
    got = found("kernels.attention.variants", "attend_by")(frozenset({name}), q, kv, case.spec)
    exact = attention_reference.attend(q.double(), PagedKV(kv.keys.double(), kv.values.double(), kv.batch), case.spec)
    assert_earned(got, attention_reference.attend(q, kv, case.spec), exact)


def with_variants() -> dict[str, tuple[Any, Callable[..., None], tuple[torch.dtype, ...]]]:
    try:
        names = found("kernels.attention.variants", "VARIANTS")
    except NotBuiltError:
        return CHECKS
    plain = [case for case in attention_cases.CASES if getattr(case, "pool", "plain") == "plain" and case.size != "huge"]
    return CHECKS | {name: (plain, partial(check_variant, name), (torch.bfloat16,)) for name in names}


def passes(clock: Clock, check: Callable[..., None], case: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        check(case, *([] if dtype is None else [dtype]), clock.device.type, patch)
        clock.synchronize()
    return {"passes": True}
