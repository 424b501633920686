"""The variants of attention on the device: Hopper's prefill by the 2 x rule, the others by the bits of the two launches."""

from __future__ import annotations

import pytest
import torch

from kernels.attention.cases import AttentionCase
from tests.kernels import checks_attention
from tests.kernels.checks_attention import HOPPER_CASES, MIXED_CASES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", HOPPER_CASES, ids=lambda case: case.name)
def test_hopper_prefill(case: AttentionCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("written for compute capability 9.0")
    checks_attention.check_hopper(case, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MIXED_CASES, ids=lambda case: case.name)
def test_one_launch_gives_the_bits_of_two(case: AttentionCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    checks_attention.check_mixed(case, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize("case", MIXED_CASES, ids=lambda case: case.name)
def test_two_streams_give_the_bits_of_one(case: AttentionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    checks_attention.check_two_streams(case, torch.bfloat16, "cuda", monkeypatch)
