"""Rows of the state between steps: who gets one, who loses one, what is sent of block tables, what PENDING becomes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.ops import StepOps
from kernels.step.reference import apply, prepare
from service.runner.state import StateTable
from service.scheduling.plan import PENDING, Sample, Slice, StepPlan
from service.scheduling.sampling import SamplingParams

CPU = torch.device("cpu")
ONE = SamplingParams(max_tokens=1)


class Counted:
    """Counts the table entries that are sent one launch for all."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def apply(self, tables: Tensor, updates: Tensor) -> None:
        assert len(updates[0].unique()) == updates.shape[1], "a place comes once"
        self.sent.append(updates.shape[1])
        apply(tables, updates)


def held(num_groups: int = 1, width: int = 200, max_sequences: int = 2) -> tuple[StateTable, Counted]:
    state, counted = StateTable(CPU), Counted()
    state.hold_tables(StepOps(counted.apply, prepare), num_groups, width, max_sequences)
    counted.sent.clear()
    return state, counted


def one(sequence: int, *tables: tuple[int, ...], token: int = 5) -> Slice:
    return Slice(sequence, 0, (token,), tables or ((0,),))


def drawn(*sequences: tuple[int, ...]) -> StepPlan:
    """A plan whose samples are of these gangs."""
    slices = tuple(one(sequence) for gang in sequences for sequence in gang)
    samples, at = [], 0
    for gang in sequences:
        samples.append(Sample(gang[0], tuple(range(at, at + len(gang))), ONE, 1, 0))
        at += len(gang)
    return StepPlan(0, slices, tuple(samples))


def test_rows_stay_and_come_back() -> None:
    state = StateTable(CPU)
    first = state.admit([one(3), one(9)])
    again = state.admit([one(9), one(4), one(3)])
    assert [int(first[1]), int(first[0])] == [int(again[0]), int(again[2])]
    assert len({*again.tolist()}) == 3
    state.release((9, 77))
    assert int(state.admit([one(12)])[0]) == int(first[1])


def test_without_graphs_the_table_grows_with_a_step() -> None:
    state = StateTable(CPU)
    many = [one(sequence) for sequence in range(150)]
    assert len(set(state.admit(many).tolist())) == 150
    state.keep(drawn(*((sequence,) for sequence in range(150))), torch.arange(150) + 1000)
    more = [one(sequence) for sequence in range(100, 400)]
    assert len(set(state.admit(more).tolist())) == 300
    ids = torch.full((50,), PENDING)
    kept = [one(sequence, token=PENDING) for sequence in range(100, 150)]
    state.resolve(kept, state.admit(kept), ids)
    assert ids.tolist() == list(range(1100, 1150))


def test_with_graphs_who_was_longest_in_no_step_loses_its_row() -> None:
    state, _ = held(max_sequences=2)
    state.admit([one(0), one(1)])
    state.admit([one(2), one(3)])
    rows = state.admit([one(2), one(4)])  # 0 or 1 goes, 3 was in the last step
    state.keep(drawn((2,), (4,)), torch.tensor([22, 44]))
    assert set(state._row_of) >= {2, 3, 4}
    assert len(state._row_of) == 4
    assert len(set(rows.tolist())) == 2
    with pytest.raises(ValueError, match="more sequences than the 2 that graphs were captured for"):
        state.admit([one(5), one(6), one(7)])


def test_who_is_in_the_step_loses_no_row_to_who_comes() -> None:
    state, _ = held(max_sequences=2)
    first = int(state.admit([one(0)])[0])
    for _ in range(3):
        state.admit([one(1), one(2)])
    state.admit([one(3)])
    assert state.admit([one(0), one(4)]).tolist()[0] == first
    assert state._row_of[0] == first


def test_a_preempted_sequence_gets_its_table_again() -> None:
    state, counted = held(max_sequences=1)
    state.block_tables([one(0, (3, 4, 5))], state.admit([one(0)]))
    state.admit([one(1)])
    state.admit([one(2)])  # takes the row of 0
    assert 0 not in state._row_of
    counted.sent.clear()
    rows = state.admit([one(0)])
    assert state.block_tables([one(0, (7, 4))], rows)[0].tolist() == [[7, 4]]
    assert counted.sent == [2]


def test_a_row_that_changes_hands_holds_the_table_of_who_has_it() -> None:
    state, counted = held(max_sequences=1)
    state.block_tables([one(0, (3, 4, 5))], state.admit([one(0)]))
    state.release((0,))
    counted.sent.clear()
    rows = state.admit([one(1)])
    assert state.block_tables([one(1, (3, 9, 8))], rows)[0].tolist() == [[3, 9, 8]]
    assert counted.sent == [2], "a prefix that both have is there already"


def test_an_id_goes_to_all_sequences_of_a_gang() -> None:
    state = StateTable(CPU)
    plan = drawn((0, 1), (2,), (3, 4))
    state.admit(plan.slices)
    state.keep(plan, torch.tensor([70, 80, 90]))
    pieces = [one(4, token=PENDING), one(2), one(1, token=PENDING), Slice(0, 4, (1, 2, PENDING), ((0,),))]
    ids = torch.tensor([-1, 5, -1, 1, 2, -1])
    state.resolve(pieces, state.admit(pieces), ids)
    assert ids.tolist() == [90, 5, 70, 1, 2, 70]


def test_of_several_samples_of_a_sequence_the_last_counts() -> None:
    state = StateTable(CPU)
    piece = Slice(6, 0, (5, 6, 7), ((0,),))
    state.admit([piece])
    samples = tuple(Sample(6, (0,), ONE, 1 + ahead, 0, back=2 - ahead) for ahead in range(3))
    state.keep(StepPlan(0, (piece,), samples), torch.tensor([11, 12, 13]))
    ids = torch.tensor([-1])
    state.resolve([one(6, token=PENDING)], state.admit([one(6)]), ids)
    assert ids.tolist() == [13]


def test_an_id_is_forgotten_with_its_sequence() -> None:
    state = StateTable(CPU)
    plan = drawn((0,))
    state.admit(plan.slices)
    state.keep(plan, torch.tensor([7]))
    state.release((0,))
    state.keep(plan, torch.tensor([8]))  # too late: nobody is there
    with pytest.raises(ValueError, match="sequence 0 waits"):
        state.resolve([one(0, token=PENDING)], state.admit([one(0)]), torch.tensor([-1]))


def test_only_blocks_that_came_are_sent() -> None:
    state, counted = held(num_groups=2)
    long = tuple(range(100, 260))

    def new(*tables: tuple[int, ...]) -> list[tuple[int, int]]:
        """(column, block) of single new blocks, which a step's own kernel puts in their place, as here."""
        piece = one(0, *tables)
        row = int(state.admit([piece])[0])
        columns, blocks = state.new_blocks([piece], np.array([row]))
        found = []
        for group, (column, block) in enumerate(zip(columns[:, 0].tolist(), blocks[:, 0].tolist(), strict=True)):
            if column >= 0:
                state.on_device.tables[group, row, column] = block
                found.append((column, block))
        return found

    assert new(long, (7,)) == [(0, 7)]  # a single one goes with the step's numbers, more have a launch of their own
    assert counted.sent == [160]
    assert new(long, (7,)) == []
    assert new((*long, 3), (7,)) == [(160, 3)]
    gone = (*long[:2], -1, *long[3:], 3)  # a block behind a window
    assert new(gone, (7, 8)) == [(1, 8)]
    assert new((*gone[:140], 9, *gone[141:]), (7, 8)) == [(140, 9)]
    assert counted.sent == [160]
    assert new(long, (7, 8, 9, 10)) == []  # 2 and 140 are others now, and so are two of the second group
    assert counted.sent == [160, 4]
    tables = state.on_device.tables
    row = state._row_of[0]
    assert tables[0, row, :161].tolist() == [*long, 3]
    assert tables[1, row, :4].tolist() == [7, 8, 9, 10]
    assert new((5,) * 201, (7,)) == []  # a guess beyond the context has no place
    assert tables[0, row].tolist() == [5] * 200


def test_tables_are_gathered_in_the_order_of_slices() -> None:
    state, _ = held(num_groups=2, max_sequences=3)
    pieces = [one(0, (1, 2, 3), (-1, 5)), one(1, (4,), (6, 7)), one(2, (8, 9), (10,))]
    state.block_tables(pieces, state.admit(pieces))
    chosen = [pieces[2], pieces[0]]
    first, second = state.block_tables(chosen, state.admit(chosen))
    assert first.tolist() == [[8, 9, 0], [1, 2, 3]]
    assert second.tolist() == [[10, 0], [0, 5]]
