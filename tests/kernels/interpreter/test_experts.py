"""The kernels of experts on Triton's interpreter: the tiny cases, and the small ones in the long run."""

from __future__ import annotations

import pytest

from kernels.experts import cases
from tests.kernels.checks_experts import check_experts
from tests.kernels.interpreter.test_on_interpreter import DTYPES, sized


@pytest.mark.parametrize("case", sized(cases.CASES))
def test_experts(case: cases.ExpertsCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dtype a case, in turn."""
    check_experts(case, DTYPES[cases.CASES.index(case) % 3], "cpu", monkeypatch)
