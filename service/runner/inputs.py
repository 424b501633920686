"""Ints to tensors: the only place where a `StepPlan` becomes arrays. Knows block arithmetic, no model and no kernel.

Shape suffixes: T tokens, S sequences, W blocks in the widest table, R rows to sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.ops import PagedBatch
from service.scheduling.plan import StepPlan


@dataclass(slots=True)
class StepInputs:
    """ids, positions int64 [T]; batches: a `PagedBatch` per K/V group; rows int64 [R]: the tokens whose logits samples are drawn from,
    in the order samples name them."""

    ids: Tensor
    positions: Tensor
    batches: list[PagedBatch]
    rows: Tensor

    @property
    def is_all_decode(self) -> bool:
        batch = self.batches[0]
        return batch.num_decodes == batch.context_len.shape[0]


def build_inputs(plan: StepPlan, num_groups: int, block_size: int, device: torch.device) -> StepInputs:
    """Slices with one token come first in the plan, as the attention contract wants them."""
    slices = plan.slices
    lengths = [len(piece.tokens) for piece in slices]
    query_start = np.zeros(len(slices) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_start[1:])
    ids = np.fromiter((token for piece in slices for token in piece.tokens), dtype=np.int64, count=int(query_start[-1]))
    positions = np.concatenate([np.arange(piece.start, piece.start + n, dtype=np.int64) for piece, n in zip(slices, lengths, strict=True)])
    context_len = np.fromiter((piece.start + n for piece, n in zip(slices, lengths, strict=True)), dtype=np.int32, count=len(slices))
    num_decodes = sum(1 for n in lengths if n == 1)
    known = [first for piece, first in zip(slices, query_start.tolist(), strict=False) if piece.is_first_known]
    owner = np.repeat(np.arange(len(slices)), lengths)
    rows = np.fromiter((query_start[i + 1] - 1 - sample.back for sample in plan.samples for i in sample.slice_indexes), dtype=np.int64)

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    query_start_t, context_len_t = on_device(query_start), on_device(context_len)
    grid_start = _grid_start(plan, query_start)
    grid_start_t = None if grid_start is None else on_device(grid_start)
    batches = []
    for group in range(num_groups):
        tables = [piece.tables[group] for piece in slices]
        table = np.zeros((len(slices), max(map(len, tables))), dtype=np.int32)
        for row, blocks in enumerate(tables):
            table[row, : len(blocks)] = blocks
        np.maximum(table, 0, out=table)  # a block behind the window is -1; it is never read, but must be a valid index
        slots = table[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
        slots[known] = -1
        batches.append(
            PagedBatch(
                slots=on_device(slots),
                block_table=on_device(table),
                query_start=query_start_t,
                context_len=context_len_t,
                num_decodes=num_decodes,
                max_query_len=max((n for n in lengths if n > 1), default=0),
                max_context_len=int(context_len.max()),
                grid_start=grid_start_t,
            )
        )
    return StepInputs(on_device(ids), on_device(positions), batches, on_device(rows))


def _grid_start(plan: StepPlan, query_start: np.ndarray) -> np.ndarray | None:
    """int32 [T], None when no slice has a code."""
    if not any(piece.grid_starts for piece in plan.slices):
        return None
    found = np.full(query_start[-1], -1, dtype=np.int32)
    for piece, first in zip(plan.slices, query_start, strict=False):
        found[first : first + len(piece.grid_starts)] = piece.grid_starts
    return found
