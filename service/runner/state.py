"""What stays on the device from step to step: of each live sequence the id drawn last, and where graphs are, its block tables.

A row a sequence. The host remembers what it has sent, so only blocks that came are sent again. No kernel and no model here, and nothing
waits for the device. Called by the runner and by its graphs. Shape suffixes: G K/V groups, N rows, W blocks in the widest table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import StepOps, StepState
from service.runner.inputs import on_device
from service.scheduling.plan import PENDING, Slice, StepPlan

Tables = tuple[tuple[int, ...], ...]
Rows = NDArray[np.int64]

_FIRST_ROWS = 64
_COMPARED = 64
"""Entries of two tables that are compared at once: a table behind a window changes in a few places."""


class StateTable:
    """Rows go to sequences at first sight and come back when a plan releases them. Where none is left, the sequence that was longest in no
    step loses its own: a row is worth nothing but the sending of its table, save the newest id, and whose that is takes part in this
    step or the last one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ids = torch.zeros(_FIRST_ROWS, dtype=torch.int64, device=device)
        self.tables: Tensor | None = None  # int32 [G, N, W]
        self._ops: StepOps | None = None
        self._row_of: dict[int, int] = {}
        self._owners: list[int | None] = []
        self._sent: list[Tables] = []
        self._free: list[int] = []
        self._has_id = np.zeros(0, dtype=np.bool_)
        self._last_step = np.zeros(0, dtype=np.int64)
        self._step = 0
        self._add_rows(_FIRST_ROWS)

    def hold_tables(self, ops: StepOps, num_groups: int, width: int, max_sequences: int) -> None:
        """From now on block tables are here too, and nothing changes its address. max_sequences: of one plan. Call before the first plan
        that counts; what was known is forgotten."""
        num_rows = 2 * max_sequences
        self._ops = ops
        self.ids = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        self.tables = torch.zeros((num_groups, num_rows, width), dtype=torch.int32, device=self.device)
        self._row_of, self._owners, self._sent, self._free = {}, [], [], []
        self._has_id, self._last_step = np.zeros(0, dtype=np.bool_), np.zeros(0, dtype=np.int64)
        self._add_rows(num_rows)
        ops.apply(self.tables, torch.zeros((2, 1), dtype=torch.int64, device=self.device))  # compiled now and not in the first step

    @property
    def on_device(self) -> StepState:
        """As the kernels take it. Raises: ValueError where no tables are held."""
        if self.tables is None:
            raise ValueError("no block tables are held on the device")
        return StepState(self.ids, self.tables)

    # -- sequences come and go --

    def release(self, sequence_ids: Sequence[int]) -> None:
        for sequence_id in sequence_ids:
            row = self._row_of.pop(sequence_id, None)
            if row is not None:
                self._owners[row], self._has_id[row] = None, False  # what was sent is still there: whoever comes may begin alike
                self._free.append(row)

    def admit(self, slices: Sequence[Slice]) -> Rows:
        """The row of each slice's sequence; begins a step. Mutates: who holds which row."""
        self._step += 1
        row_of = self._row_of
        try:
            rows = [row_of[piece.sequence_id] for piece in slices]
        except KeyError:
            known = [row_of[piece.sequence_id] for piece in slices if piece.sequence_id in row_of]
            self._last_step[known] = self._step  # before anybody has to give a row away
            rows = [self._row_for(piece.sequence_id) for piece in slices]
        found = np.array(rows, dtype=np.int64)
        self._last_step[found] = self._step
        return found

    def _row_for(self, sequence_id: int) -> int:
        row = self._row_of.get(sequence_id)
        if row is not None:
            return row
        if not self._free:
            self._make_room()
        row = self._free.pop()
        self._row_of[sequence_id], self._owners[row], self._last_step[row] = row, sequence_id, self._step
        return row

    def _make_room(self) -> None:
        oldest = int(self._last_step.argmin())
        owner = self._owners[oldest]
        if owner is not None and self._last_step[oldest] < self._step - 1:
            self.release((owner,))
        elif self.tables is None:
            self.ids = torch.cat((self.ids, torch.zeros_like(self.ids)))
            self._add_rows(len(self._owners))
        else:
            raise ValueError(f"a plan has more sequences than the {len(self._owners) // 2} that graphs were captured for")

    def _add_rows(self, count: int) -> None:
        first = len(self._owners)
        self._owners += [None] * count
        self._sent += [()] * count
        self._free += range(first + count - 1, first - 1, -1)
        self._has_id = np.concatenate((self._has_id, np.zeros(count, dtype=np.bool_)))
        self._last_step = np.concatenate((self._last_step, np.zeros(count, dtype=np.int64)))

    # -- ids that the host does not know yet --

    @torch.inference_mode()
    def keep(self, plan: StepPlan, ids: Tensor) -> None:
        """The ids int64 [R] that were drawn for the plan's samples are from now on what PENDING means for all sequences of their slices;
        of a sequence with several samples (drafts) the last. Does not wait for the device."""
        row_of, slices = self._row_of, plan.slices
        rows = [row_of.get(slices[at].sequence_id, -1) for sample in plan.samples for at in sample.slice_indexes]
        samples = [index for index, sample in enumerate(plan.samples) for _ in sample.slice_indexes]
        picks = dict(zip(rows, samples, strict=True))
        picks.pop(-1, None)  # of sequences that have ended
        if not picks:
            return
        sent = on_device(np.array((list(picks), list(picks.values())), dtype=np.int64), self.device)
        self.ids.index_copy_(0, sent[0], ids[sent[1]])
        self._has_id[list(picks)] = True

    def resolve(self, slices: Sequence[Slice], rows: Rows, ids: Tensor) -> None:
        """Puts the ids drawn last where a slice's last token is PENDING. ids int64 [T] of all slices. Mutates: ids.

        Raises: ValueError for a sequence for which none was drawn here.
        """
        waiting = [at for at, piece in enumerate(slices) if piece.tokens[-1] == PENDING]
        if not waiting:
            return
        self.require_ids(rows[waiting])
        ends = np.cumsum([len(piece.tokens) for piece in slices])[waiting] - 1
        sent = on_device(np.stack((ends, rows[waiting])), self.device)
        ids.index_copy_(0, sent[0], self.ids[sent[1]])

    def last_id(self, sequence_id: int) -> Tensor:
        """int64 [1]: the id drawn last for a sequence, until `keep` is called again. Raises: ValueError where none was drawn here."""
        row = self._row_of.get(sequence_id)
        if row is None:
            raise ValueError(f"sequence {sequence_id} has no row")
        self.require_ids(np.array([row]))
        return self.ids[row : row + 1]

    def require_ids(self, rows: Rows) -> None:
        """Raises: ValueError where one of them has none."""
        if not self._has_id[rows].all():
            owner = self._owners[int(rows[~self._has_id[rows]][0])]
            raise ValueError(f"sequence {owner} waits for an id that was drawn, and none was drawn for it here")

    # -- block tables --

    def forget_tables(self, rows: Rows) -> None:
        """What counts as sent of these may not have come there: next time all of it is sent, whoever has the row then."""
        for row in rows.tolist():
            self._sent[row] = ()

    def new_blocks(self, slices: Sequence[Slice], rows: Rows) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(columns, blocks) int32 [G, S]: the one block that each table has won since it was last sent, column -1 where there is none.

        Tables that have won more are sent at once. Mutates: what counts as sent, so the caller has to send what it gets.
        """
        num_groups = self.on_device.tables.shape[0]
        columns = np.full((num_groups, len(slices)), -1, dtype=np.int32)
        blocks = np.zeros((num_groups, len(slices)), dtype=np.int32)
        many = []
        for at, group, row, won, table in self._changes(slices, rows):
            if len(won) == 1:
                columns[group, at], blocks[group, at] = won[0], table[won[0]]
            else:
                many.append((group, row, won, table))
        self._send(many)
        return columns, blocks

    def block_tables(self, slices: Sequence[Slice], rows: Rows) -> list[Tensor]:
        """int32 [S, W of the widest] by group, gathered on the device. Mutates: the tables there, brought up to these slices."""
        self._send([(group, row, won, table) for _, group, row, won, table in self._changes(slices, rows)])
        sent = on_device(rows, self.device)
        return [
            tables[:, : max(len(piece.tables[group]) for piece in slices)].index_select(0, sent)
            for group, tables in enumerate(self.on_device.tables)
        ]

    def _changes(self, slices: Sequence[Slice], rows: Rows) -> Iterator[tuple[int, int, int, Sequence[int], tuple[int, ...]]]:
        """(index of the slice, group, row, columns that hold another block than before, table) for tables with such columns."""
        width = self.on_device.tables.shape[2]
        sent, in_order = self._sent, rows.tolist()
        for at, (piece, row) in enumerate(zip(slices, in_order, strict=True)):
            if piece.tables is sent[row]:
                continue
            before = sent[row] or ((),) * len(piece.tables)
            sent[row] = piece.tables
            for group, (old, new) in enumerate(zip(before, piece.tables, strict=True)):
                won = _won(old, new, width)
                if won:
                    yield at, group, row, won, new

    def _send(self, changes: Sequence[tuple[int, int, Sequence[int], tuple[int, ...]]]) -> None:
        if not changes or self._ops is None or self.tables is None:
            return
        num_rows, width = self.tables.shape[1:]
        counts = [len(won) for _, _, won, _ in changes]
        starts = np.repeat([(group * num_rows + row) * width for group, row, _, _ in changes], counts)
        updates = np.empty((2, sum(counts)), dtype=np.int64)
        updates[0] = starts + np.concatenate([np.array(won, dtype=np.int64) for _, _, won, _ in changes])
        updates[1] = [table[column] for _, _, won, table in changes for column in won]
        self._ops.apply(self.tables, on_device(updates, self.device))


def _won(old: tuple[int, ...], new: tuple[int, ...], width: int) -> Sequence[int]:
    """Columns in which new has a block that old had not. A lost one (-1) is not worth sending: what stood there stays a valid block."""
    end = min(len(new), width)
    shared = min(len(old), end)
    won: list[int] = []
    if old[:shared] != new[:shared]:
        for first in range(0, shared, _COMPARED):
            if old[first : first + _COMPARED] != new[first : first + _COMPARED]:
                won += [column for column in range(first, min(first + _COMPARED, shared)) if new[column] not in (-1, old[column])]
    if shared < end:
        won += [column for column in range(shared, end) if new[column] >= 0]
    return won
