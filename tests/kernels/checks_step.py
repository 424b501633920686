"""What is asked of the kernels that prepare a step: every number equal to the reference's, and nothing else touched. No cases here.

Called by the tests on the interpreter and on a GPU.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from kernels.ops import StepRows, StepState
from kernels.step import cases, reference
from kernels.step import triton as step
from tests.kernels.rule import assert_guards_whole, guarded


def check_prepare(case: cases.StepCase, device: str) -> None:
    numbers, state, rows = cases.build(case, device)
    own = StepState(state.ids.clone(), state.tables.clone())
    expected = StepRows(**{field.name: getattr(rows, field.name).clone() for field in fields(StepRows)})
    reference.prepare(numbers, own, expected, case.block_size)
    memories: list[Tensor] = []
    state = StepState(state.ids, _guarded(state.tables, memories))
    rows = StepRows(**{field.name: _guarded(getattr(rows, field.name), memories) for field in fields(StepRows)})
    step.prepare(numbers, state, rows, case.block_size)
    assert torch.equal(state.ids, own.ids)
    assert torch.equal(state.tables, own.tables)
    for field in fields(StepRows):
        assert torch.equal(getattr(rows, field.name), getattr(expected, field.name)), field.name
    for memory in memories:
        assert_guards_whole(memory)


def check_first_rows_of_larger_tensors(case: cases.StepCase, device: str) -> None:
    """As graphs of several sizes share them: rows behind the step's own stay as they are."""
    numbers, state, rows = cases.build(case, device)
    larger = cases.build(replace(case, size=case.size + 3), device, seed=1)[2]
    kept = StepRows(**{field.name: getattr(larger, field.name).clone() for field in fields(StepRows)})
    own = StepState(state.ids, state.tables.clone())
    reference.prepare(numbers, own, rows, case.block_size)
    step.prepare(numbers, state, first_rows(larger, case.size), case.block_size)
    for name in ("ids", "positions", "context_len", "grid_start"):
        assert torch.equal(getattr(larger, name)[: case.size], getattr(rows, name)), name
        assert torch.equal(getattr(larger, name)[case.size :], getattr(kept, name)[case.size :]), name
    assert torch.equal(larger.slots[:, : case.size], rows.slots)
    assert torch.equal(larger.slots[:, case.size :], kept.slots[:, case.size :])
    assert torch.equal(larger.block_table[:, case.size :], kept.block_table[:, case.size :])


def first_rows(rows: StepRows, size: int) -> StepRows:
    return StepRows(
        rows.ids[:size], rows.positions[:size], rows.slots[:, :size], rows.context_len[:size], rows.grid_start[:size],
        rows.block_table[:, :size],
    )  # fmt: skip


def check_apply(case: cases.StepCase, device: str) -> None:
    tables, updates = cases.build_updates(case, device)
    expected = tables.clone()
    reference.apply(expected, updates)
    memories: list[Tensor] = []
    got = _guarded(tables, memories)
    step.apply(got, updates)
    assert torch.equal(got, expected)
    assert_guards_whole(memories[0])


def _guarded(tensor: Tensor, memories: list[Tensor]) -> Tensor:
    """The same numbers between canaries."""
    inner, memory = guarded(tuple(tensor.shape), tensor.dtype, tensor.device)
    inner.copy_(tensor)
    memories.append(memory)
    return inner
