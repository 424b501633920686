"""A captured step's inputs out of a few numbers a row and what the device knows of its sequences, in plain PyTorch.

No Triton here and no model. Called by `reference_ops` and by tests.
Shape suffixes: G groups of layers, S rows of a step, N rows of the state, W blocks in the widest table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ops import StepRows, StepState

ROW, START, TOKEN, KNOWN, GRID_START = range(5)
"""What the first rows of `numbers` are; columns of new blocks follow for each group, then these blocks."""
NUM_FIELDS = 5


def apply(tables_GNW: Tensor, updates: Tensor) -> None:
    """tables int32, contiguous; updates int64 [2, n]: places in the flat tables, each once, and what they hold from now on."""
    tables_GNW.view(-1)[updates[0]] = updates[1].to(tables_GNW.dtype)


def prepare(numbers: Tensor, state: StepState, rows: StepRows, block_size: int) -> None:
    """See `kernels.ops.StepOps`. numbers int32 [5 + 2 * G, S]. Mutates: rows and state.tables."""
    width, num_groups = state.tables.shape[2], len(state.tables)
    row, start, token, known, grid_start = numbers[:NUM_FIELDS].long()
    columns, blocks = numbers[NUM_FIELDS:].view(2, num_groups, -1)
    is_row = row >= 0
    for group, table in enumerate(state.tables):
        is_new = is_row & (columns[group] >= 0) & (columns[group] < width)
        table[row[is_new], columns[group][is_new].long()] = blocks[group][is_new]
    rows.ids.copy_(torch.where(is_row, torch.where(token < 0, state.ids[row.clamp(min=0)], token), 0))
    rows.positions.copy_(torch.where(is_row, start, 0))
    rows.context_len.copy_(torch.where(is_row, start + 1, 0))
    rows.grid_start.copy_(torch.where(is_row, grid_start, -1))
    column = torch.where(is_row, start // block_size, 0)
    is_written = is_row & (known == 0) & (column < width)
    is_needed = torch.arange(width, device=numbers.device) <= torch.where(is_row, column, -1)[:, None]
    for group, table in enumerate(state.tables):
        its_table = table[row.clamp(min=0)]
        block = its_table.gather(1, column.clamp(max=width - 1)[:, None])[:, 0].long()
        rows.slots[group].copy_(torch.where(is_written, block * block_size + start % block_size, -1))
        rows.block_table[group].copy_(torch.where(is_needed, its_table, rows.block_table[group]))
