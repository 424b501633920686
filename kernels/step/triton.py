"""A captured step's inputs out of a few numbers a row and what the device knows of its sequences: one launch for all rows and groups.

No model here. Called by `triton_ops`. Shape suffixes: G groups of layers, S rows of a step, N rows of the state, W blocks in the widest
table.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import StepRows, StepState

TILE = 1024
"""Entries that are moved at once: all of a context of 16 thousand tokens in blocks of 16."""


def apply(tables_GNW: Tensor, updates: Tensor) -> None:
    """tables int32, contiguous; updates int64 [2, n]: places in the flat tables, each once, and what they hold from now on.

    Raises: ValueError for strided tensors.
    """
    if not (tables_GNW.is_contiguous() and updates.is_contiguous()):
        raise ValueError("tables and updates must be contiguous")
    count = updates.shape[1]
    if count:
        apply_kernel[(triton.cdiv(count, TILE),)](tables_GNW, updates, count, TILE=TILE, num_warps=4)


def prepare(numbers: Tensor, state: StepState, rows: StepRows, block_size: int) -> None:
    """See `kernels.ops.StepOps`. numbers int32 [5 + 2 * G, S]. Mutates: rows and state.tables. Raises: ValueError for strided tensors."""
    if not (numbers.is_contiguous() and state.tables.is_contiguous() and rows.slots.stride(1) == rows.block_table.stride(2) == 1):
        raise ValueError("numbers, tables and the rows of a step must be contiguous")
    num_groups, num_rows, width = state.tables.shape
    size = numbers.shape[1]
    prepare_kernel[(size, num_groups)](
        numbers,
        state.ids,
        state.tables,
        rows.ids,
        rows.positions,
        rows.slots,
        rows.context_len,
        rows.grid_start,
        rows.block_table,
        size,
        num_rows,
        width,
        rows.slots.stride(0),
        *rows.block_table.stride()[:2],
        G=num_groups,
        P=block_size,
        TILE=TILE,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["count"])
def apply_kernel(tables_ptr, updates_ptr, count, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    place = tl.load(updates_ptr + at, mask=at < count, other=0)
    block = tl.load(updates_ptr + count + at, mask=at < count, other=0)
    tl.store(tables_ptr + place, block.to(tl.int32), mask=at < count)


@triton.jit(do_not_specialize=["size", "num_rows", "width", "stride_slots", "stride_group", "stride_row"])
def prepare_kernel(
    numbers_ptr, last_ids_ptr, tables_ptr, ids_ptr, positions_ptr, slots_ptr, context_len_ptr, grid_start_ptr, block_table_ptr,
    size, num_rows, width, stride_slots, stride_group, stride_row,
    G: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One row and one group. The new block is put into what was read of the table by its column, never read back: so no thread waits for
    another one's write. Offsets into tables are 64-bit."""
    at = tl.program_id(0)
    group = tl.program_id(1)
    row = tl.load(numbers_ptr + at)
    start = tl.load(numbers_ptr + size + at)
    column = tl.load(numbers_ptr + (5 + group) * size + at)
    block = tl.load(numbers_ptr + (5 + G + group) * size + at)
    is_row = row >= 0
    context_len = tl.where(is_row, start + 1, 0)
    table = tables_ptr + (group.to(tl.int64) * num_rows + tl.maximum(row, 0)) * width

    for first in range(0, tl.minimum(tl.cdiv(context_len, P), width), TILE):
        entry = first + tl.arange(0, TILE)
        is_needed = (entry * P < context_len) & (entry < width)
        held = tl.load(table + entry, mask=is_needed, other=0)
        target = block_table_ptr + group.to(tl.int64) * stride_group + at.to(tl.int64) * stride_row + entry
        tl.store(target, tl.where(entry == column, block, held), mask=is_needed)

    own = start // P
    is_inside = is_row & (own < width)
    held_own = tl.load(table + own, mask=is_inside, other=0)
    slot = tl.where(own == column, block, held_own).to(tl.int64) * P + start % P
    known = tl.load(numbers_ptr + 3 * size + at)
    tl.store(slots_ptr + group * stride_slots + at, tl.where(is_inside & (known == 0), slot, -1))
    tl.store(table + column, block, mask=is_row & (column >= 0) & (column < width))

    if group == 0:
        token = tl.load(numbers_ptr + 2 * size + at)
        last = tl.load(last_ids_ptr + row, mask=is_row, other=0)
        tl.store(ids_ptr + at, tl.where(is_row, tl.where(token < 0, last, token.to(tl.int64)), 0))
        tl.store(positions_ptr + at, tl.where(is_row, start, 0).to(tl.int64))
        tl.store(context_len_ptr + at, context_len)
        tl.store(grid_start_ptr + at, tl.where(is_row, tl.load(numbers_ptr + 4 * size + at), -1))
