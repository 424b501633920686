"""The variants of attention on the device: Hopper's prefill by the 2 x rule, the others by the bits of the two launches."""

from __future__ import annotations

import pytest
import torch

from kernels.attention.cases import AttentionCase
from tests.kernels.checks_attention import VARIANT_CHECKS, Check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
EACH = [
    pytest.param(check, case, dtype, id=f"{name.split('/')[1]}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for name, (cases, check, dtypes) in VARIANT_CHECKS.items()
    for case in cases
    for dtype in dtypes
]


@pytest.mark.parametrize(("check", "case", "dtype"), EACH)
def test_variant(check: Check, case: AttentionCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, dtype, "cuda", monkeypatch)
