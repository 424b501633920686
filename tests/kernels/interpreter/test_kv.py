"""Quantised keys and values on Triton's interpreter, beside the cases, which run with all the others: every number, and a whole model."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import cases as attention_cases
from kernels.attention.reference import attend as attend_plainly
from kernels.attention.triton import attend
from tests.kernels import checks_e4m3
from tests.runner.hybrid import FP8, desk_of, hybrid, logits, moved


def test_e4m3_is_written_as_torch_writes_it() -> None:
    checks_e4m3.check_encoding("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_number_is_unpacked_without_rounding(dtype: torch.dtype) -> None:
    checks_e4m3.check_unpacking(dtype, "cpu")


def test_queries_may_be_wider_than_a_plain_pool() -> None:
    """--dtype float32 beside --kv-dtype bfloat16."""
    case = next(case for case in attention_cases.CASES if case.name == "odd_block")
    q, kv = attention_cases.build(case, torch.bfloat16)
    torch.testing.assert_close(attend(q.float(), kv, case.spec), attend_plainly(q.float(), kv, case.spec), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_a_model_with_windows_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number on the edge between two may fall to either side; all others are the same."""
    monkeypatch.setattr("service.runner.kv_cache.as_kept", lambda keys: keys)  # as on a GPU
    expected = logits(desk_of(hybrid(), FP8), count=52)
    assert moved(logits(desk_of(hybrid("triton"), FP8), count=52), expected) < 1e-3
