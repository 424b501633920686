"""Where the pictures of a step's codes begin, as one tensor for all K/V groups; no tensor at all for a step of text."""

from __future__ import annotations

import torch

from service.runner.inputs import build_inputs
from service.scheduling.plan import Slice, StepPlan

CPU = torch.device("cpu")


def test_text_has_no_tensor() -> None:
    plan = StepPlan(0, (Slice(0, 4, (7,), ((0, 1),)), Slice(1, 0, (5, 6), ((2,),))), ())
    assert build_inputs(plan, 1, 4, CPU).batches[0].grid_start is None


def test_a_first_token_that_is_known_has_no_slot() -> None:
    slices = (Slice(0, 7, (7,), ((4, 2),), is_first_known=True), Slice(1, 3, (5, 6), ((3, 1),), is_first_known=True))
    assert build_inputs(StepPlan(0, slices, ()), 1, 4, CPU).batches[0].slots.tolist() == [-1, -1, 4]


def test_codes_beside_text() -> None:
    tables = ((0, 1), (2, 3))
    slices = (Slice(0, 4, (7,), tables), Slice(1, 5, (9,), tables, (3,)), Slice(2, 2, (1, 9, 9), tables, (-1, 3, 3)))
    batches = build_inputs(StepPlan(0, slices, ()), 2, 4, CPU).batches
    assert [batch.grid_start is batches[0].grid_start for batch in batches] == [True, True]
    assert batches[0].grid_start is not None
    assert batches[0].grid_start.dtype == torch.int32
    assert batches[0].grid_start.tolist() == [-1, 3, -1, 3, 3]
