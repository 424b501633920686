"""The head's fused kernel on the device: what the interpreter is asked, at every size."""

from __future__ import annotations

import pytest
import torch

from kernels.sample import cases
from tests.kernels import checks_head

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = (torch.bfloat16, torch.float16, torch.int8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "width"), [pytest.param(*each, id=each[0].name) for each in cases.HEAD_CASES])
def test_draw(case: cases.SampleCase, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    checks_head.check_draw(case, width, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "width"), [(1, 49_152, 576), (16, 49_152, 576), (64, 128_256, 4096), (3, 262_144, 1152)]
)
def test_scores(num_rows: int, vocab_size: int, width: int, dtype: torch.dtype) -> None:
    checks_head.check_scores(num_rows, vocab_size, width, dtype, "cuda")
