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


def test_slots_of_runs_that_cross_blocks() -> None:
    """Against the definition, token by token; a block behind a window is none that a token of the step goes to."""
    tables = ((7, 3, 11, 5), (-1, 8, 2, 9))
    slices = (Slice(0, 15, (7,), tables), Slice(1, 4, (5,), tables, is_first_known=True), Slice(2, 6, tuple(range(9)), tables))
    wanted = [[table[at // 4] * 4 + at % 4 for at in (15, 4, *range(6, 15))] for table in tables]
    own = [torch.full((3, 4), 99, dtype=torch.int32)] * 2
    for given in (None, own):
        batches = build_inputs(StepPlan(0, slices, ()), 2, 4, CPU, given).batches
        for batch, slots in zip(batches, wanted, strict=True):
            assert batch.slots.tolist() == [slots[0], -1, *slots[2:]]
            assert batch.block_table.shape == (3, 4)
            assert (batch.block_table is own[0]) == (given is own)
    assert build_inputs(StepPlan(0, slices, ()), 2, 4, CPU).batches[1].block_table[0].tolist() == [0, 8, 2, 9]
