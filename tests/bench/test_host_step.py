"""The bench of what the host does for a decode step: its plans are the scheduler's kind, and each is replayed."""

from __future__ import annotations

import torch

from bench.host_step import BLOCK_SIZE, measure, plans
from service.scheduling.plan import PENDING


def test_plans_grow_by_a_token_and_sometimes_a_block() -> None:
    first, second = plans(BLOCK_SIZE, 40, 2, 2)
    assert all(piece.tokens == (PENDING,) and len(piece.tables) == 2 for piece in first.slices)
    assert [piece.start for piece in second.slices] == [piece.start + 1 for piece in first.slices]
    grown = [after for before, after in zip(first.slices, second.slices, strict=True) if after.tables is not before.tables]
    assert len(grown) == 1
    assert len(grown[0].tables[1]) == grown[0].start // BLOCK_SIZE + 1


def test_measures_every_part() -> None:
    found = measure(torch.device("cpu"), batch=3, context=20, num_groups=2, count=4)
    assert min(found["replay_ms"], found["keep_ms"], found["build_ms"]) > 0
