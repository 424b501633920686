"""Ints to tensors: where a `StepPlan` becomes arrays (`graphs` packs its own numbers). Knows block arithmetic, no model and no kernel.

Shape suffixes: T tokens, S sequences, W blocks in the widest table, R rows to sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import PagedBatch
from service.runner.drawing import pinned, send
from service.scheduling.plan import Slice, StepPlan

_NOTHING = torch.empty(0, dtype=torch.int32)


@dataclass(slots=True)
class StepInputs:
    """ids, positions int64 [T]; batches: a `PagedBatch` per K/V group; rows int64 [R]: the tokens whose logits samples are drawn from,
    in the order samples name them."""

    ids: Tensor
    positions: Tensor
    batches: list[PagedBatch]
    rows: Tensor


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy that nobody waits for; on the CPU the array itself."""
    return send(torch.from_numpy(array), device)


def copy_into(array: NDArray[Any], target: Tensor) -> None:
    """Copies an array into a tensor of its dtype and shape, and nobody waits for it. Mutates: target."""
    target.copy_(pinned(torch.from_numpy(array), target.device), non_blocking=True)


def build_inputs(
    plan: StepPlan, num_groups: int, block_size: int, device: torch.device, block_tables: Sequence[Tensor] | None = None
) -> StepInputs:
    """Slices with one token come first in the plan, as the attention contract wants them. A token that is PENDING is still to be put in
    its place. block_tables: int32 [S, W] by group, where the device has them already."""
    slices = plan.slices
    lengths = [len(piece.tokens) for piece in slices]
    starts = np.array([piece.start for piece in slices], dtype=np.int64)
    query_start = np.zeros(len(slices) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_start[1:])
    ids = np.fromiter((token for piece in slices for token in piece.tokens), dtype=np.int64, count=int(query_start[-1]))
    positions = np.arange(len(ids), dtype=np.int64) + np.repeat(starts - query_start[:-1], lengths)
    context_len = (starts + lengths).astype(np.int32)
    rows = np.fromiter((query_start[i + 1] - 1 - sample.back for sample in plan.samples for i in sample.slice_indexes), dtype=np.int64)
    grid_start = _grid_start(plan, query_start)
    shared = PagedBatch(
        slots=_NOTHING,
        block_table=_NOTHING,
        query_start=on_device(query_start, device),
        context_len=on_device(context_len, device),
        num_decodes=lengths.count(1),
        max_query_len=max((n for n in lengths if n > 1), default=0),
        max_context_len=int(context_len.max()),
        grid_start=None if grid_start is None else on_device(grid_start, device),
    )
    batches = []  # one for each group, with tables and slots of its own
    for group, slots in enumerate(_slots(slices, positions, num_groups, block_size)):
        table = on_device(_table(slices, group), device) if block_tables is None else block_tables[group]
        batches.append(replace(shared, slots=on_device(slots, device), block_table=table))
    return StepInputs(on_device(ids, device), on_device(positions, device), batches, on_device(rows, device))


def _slots(slices: Sequence[Slice], positions_T: NDArray[np.int64], num_groups: int, block_size: int) -> list[NDArray[np.int64]]:
    """int64 [T] by group: where each token's K/V goes, out of those blocks alone that hold the slices' tokens; -1 for what is known."""
    lengths = np.array([len(piece.tokens) for piece in slices])
    starts = np.array([piece.start for piece in slices])
    firsts, ends = starts // block_size, (starts + lengths - 1) // block_size + 1
    before = np.cumsum(ends - firsts) - (ends - firsts)
    at = positions_T // block_size + np.repeat(before - firsts, lengths)
    spans = list(map(slice, firsts.tolist(), ends.tolist()))
    known = [first for piece, first in zip(slices, (np.cumsum(lengths) - lengths).tolist(), strict=True) if piece.is_first_known]
    found = []
    for group in range(num_groups):
        blocks = chain.from_iterable(piece.tables[group][span] for piece, span in zip(slices, spans, strict=True))
        slots = np.fromiter(blocks, dtype=np.int64)[at] * block_size + positions_T % block_size
        slots[known] = -1
        found.append(slots)
    return found


def _table(slices: Sequence[Slice], group: int) -> NDArray[np.int32]:
    tables = [piece.tables[group] for piece in slices]
    found = np.zeros((len(slices), max(map(len, tables))), dtype=np.int32)
    for row, blocks in enumerate(tables):
        found[row, : len(blocks)] = blocks
    return np.maximum(found, 0, out=found)  # a block behind the window is -1; it is never read, but must be a valid index


def _grid_start(plan: StepPlan, query_start: NDArray[np.int32]) -> NDArray[np.int32] | None:
    """int32 [T], None when no slice has a code."""
    if not any(piece.grid_starts for piece in plan.slices):
        return None
    found = np.full(query_start[-1], -1, dtype=np.int32)
    for piece, first in zip(plan.slices, query_start, strict=False):
        found[first : first + len(piece.grid_starts)] = piece.grid_starts
    return found
