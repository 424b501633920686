"""Part of `bench.gpu`: every kernel case on the device, by the same checks as the tests: the 2 x rule against float64, guard rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kernels.attention import cases as attention_cases
from kernels.experts import cases as experts_cases
from kernels.gated import cases as gated_cases
from kernels.kv_write import cases as kv_write_cases
from kernels.linear import cases as linear_cases
from kernels.norm import cases as norm_cases
from kernels.sample import cases as sample_cases
from tests.kernels import checks
from tests.kernels.checks_experts import check_experts

CHECKS: dict[str, tuple[Any, Callable[..., None]]] = {
    "attention": (attention_cases.CASES, checks.check_attention),
    "kv_write": (kv_write_cases.CASES, checks.check_kv_write),
    "norm": (norm_cases.CASES, checks.check_norm),
    "gated": (gated_cases.CASES, checks.check_gated),
    "linear": (linear_cases.CASES, checks.check_linear),
    "experts": (experts_cases.CASES, check_experts),
    "sample": (sample_cases.CASES, checks.check_sample),
}


def steps() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The small cases of every kernel first, then the large ones, so that a short budget still covers all kernels."""
    for sizes in (("tiny", "small"), ("huge",)):
        for kernel, (cases, check) in CHECKS.items():
            for case in (case for case in cases if case.size in sizes):
                dtypes = [None] if kernel == "sample" else [torch.bfloat16, torch.float32]
                for dtype in dtypes:
                    name = f"{kernel}/{case.name}" + ("" if dtype is None else f"/{str(dtype).removeprefix('torch.')}")
                    yield name, lambda case=case, check=check, dtype=dtype: passes(check, case, dtype)  # type: ignore[misc]


def passes(check: Callable[..., None], case: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        check(case, *([] if dtype is None else [dtype]), "cuda", patch)
        torch.cuda.synchronize()
    return {"passes": True}
