"""The kernels of experts on Triton's interpreter: the tiny cases, and the small ones in the long run."""

from __future__ import annotations

import pytest
import torch

from kernels.experts import cases, triton
from kernels.linear.triton import linear
from tests.kernels.checks_experts import check_experts
from tests.kernels.interpreter.test_on_interpreter import DTYPES, sized


@pytest.mark.parametrize("case", sized(cases.CASES))
def test_experts(case: cases.ExpertsCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dtype a case, in turn."""
    check_experts(case, DTYPES[cases.CASES.index(case) % 3], "cpu", monkeypatch)


@pytest.mark.parametrize("name", ["crowded", "ties"])
def test_more_entries_than_are_grouped_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "GROUP_BLOCK", 16)
    case = next(case for case in cases.CASES if case.name == name)
    assert case.num_tokens * case.top_k > 16
    check_experts(case, torch.float32, "cpu", monkeypatch)


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_a_row_of_garbage_disturbs_nobody() -> None:
    """A graph's rows of padding hold what earlier steps left there."""
    x, weights, activation = cases.build(cases.ExpertsCase("", "", 4, 8, 2, 64, 32), torch.float32)
    expected = triton.experts(x, weights, activation)
    x[1] = float("nan")
    got = triton.experts(x, weights, activation)
    for row in (0, 2, 3):
        assert torch.equal(got[row], expected[row])


def test_one_tiling_for_steps_of_every_size() -> None:
    x, weights, activation = cases.build(cases.ExpertsCase("", "", 70, 3, 1, 48, 32), torch.float32)
    experts = triton.deterministic_experts(linear)
    together = experts(x, weights, activation)
    torch.testing.assert_close(together, triton.experts(x, weights, activation))
    assert torch.equal(experts(x[:3], weights, activation), together[:3])
