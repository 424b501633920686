"""The kernels that prepare a step, on Triton's interpreter."""

from __future__ import annotations

import pytest

from kernels.step import cases
from tests.kernels import checks_step

TINY = [pytest.param(case, id=case.name) for case in cases.CASES if case.scale == "tiny"]


@pytest.mark.parametrize("case", TINY)
def test_prepare(case: cases.StepCase) -> None:
    checks_step.check_prepare(case, "cpu")


def test_prepare_first_rows_of_larger_tensors() -> None:
    checks_step.check_first_rows_of_larger_tensors(next(case for case in cases.CASES if case.name == "new_blocks"), "cpu")


@pytest.mark.parametrize("case", [case for case in cases.CASES if case.name in ("one", "wide")], ids=lambda case: case.name)
def test_apply(case: cases.StepCase) -> None:
    checks_step.check_apply(case, "cpu")
