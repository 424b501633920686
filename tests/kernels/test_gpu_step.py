"""The kernels that prepare a step, on a device."""

from __future__ import annotations

import pytest
import torch

from kernels.step import cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_prepare_and_apply(case: cases.StepCase) -> None:
    from tests.kernels import checks_step

    checks_step.check_prepare(case, "cuda")
    checks_step.check_first_rows_of_larger_tensors(case, "cuda")
    checks_step.check_apply(case, "cuda")
