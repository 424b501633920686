"""The head's fused kernel on Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.ops import select_ops
from kernels.sample import cases, reference
from kernels.sample import triton as sampling
from tests.kernels import checks_head

DTYPES = (torch.bfloat16, torch.float16, torch.int8)


@pytest.mark.parametrize(
    ("case", "width"),
    [
        pytest.param(*each, id=each[0].name, marks=() if each[0].size == "tiny" else pytest.mark.long)
        for each in cases.HEAD_CASES
        if each[0].size != "bench"
    ],
)
def test_draw(case: cases.SampleCase, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dtype a case, in turn."""
    names = [each.name for each, _ in cases.HEAD_CASES]
    checks_head.check_draw(case, width, DTYPES[names.index(case.name) % 3], "cpu", monkeypatch)


@pytest.mark.parametrize(("num_rows", "dtype"), [(3, torch.bfloat16), (20, torch.float16), (3, torch.int8), (20, torch.int8)], ids=str)
def test_scores(num_rows: int, dtype: torch.dtype) -> None:
    checks_head.check_scores(num_rows, 200, 96, dtype, "cpu")


@pytest.mark.parametrize(
    "filters",
    [
        pytest.param({"top_k": 9}, marks=pytest.mark.long),
        pytest.param({"top_p": 0.7}, marks=pytest.mark.long),
        {"top_k": 30, "top_p": 0.5},
        {"top_k": 500},
    ],
)
def test_floors_of_more_tiles_than_registers_hold(filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a large vocabulary, made small."""
    monkeypatch.setattr(sampling, "FEW_TILES", 2)
    monkeypatch.setattr(sampling, "MOST_PEAKS", 2)
    logits, rows = cases.build(cases.SampleCase("", "", 3, 600, flat=3, masked=0.1, **filters))
    scored = sampling.scored(logits, rows)
    is_kept = scored.scores >= sampling.thresholds(scored, rows)[:, None]
    assert torch.equal(is_kept, scored.scores >= reference.thresholds(scored.scores, rows)[:, None])
    assert 0 < int(is_kept.sum()) < is_kept.numel()


def test_a_step_draws_through_it_what_the_reference_draws() -> None:
    x, head, rows = cases.build_head(cases.SampleCase("", "", 5, 200, top_p=0.9), 64, torch.bfloat16)
    ids = [select_ops(name).draw(x, head, rows).ids.tolist() for name in ("triton", "reference")]
    assert ids[0] == ids[1]
