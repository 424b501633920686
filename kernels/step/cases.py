"""Named steps whose inputs are prepared on the device, as data, and how to build their tensors: one list for tests, benchmarks and docs.

No expectations here. Called by `tests/kernels`.
Shape suffixes: G groups of layers, S rows of a step, N rows of the state, W blocks in the widest table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.ops import StepRows, StepState
from kernels.step.reference import GRID_START, KNOWN, NUM_FIELDS, ROW, START, TOKEN


@dataclass(frozen=True, slots=True)
class StepCase:
    """starts: positions of the tokens, a real row each; size: rows of the step, the others padded. news: (row, group, column) of each new
    block. pending: rows whose token is the id drawn last. known, codes: rows whose K/V is in its place, and those that are codes."""

    name: str
    why: str
    starts: tuple[int, ...]
    size: int
    num_groups: int = 1
    width: int = 6
    block_size: int = 16
    news: tuple[tuple[int, int, int], ...] = ()
    pending: tuple[int, ...] = ()
    known: tuple[int, ...] = ()
    codes: tuple[int, ...] = ()
    num_updates: int = 3
    scale: Literal["tiny", "bench"] = "tiny"


CASES = (
    StepCase("one", "one row and no padding", (20,), 1, pending=(0,)),
    StepCase("padded", "padding behind rows of several lengths: the first token, a block's first and last, the context's end",
             (0, 16, 31, 95), 8),
    StepCase("all_padded", "a graph is captured on padding alone", (), 4, num_groups=2),
    StepCase("new_blocks", "a new block under the token itself, before it, in one of two groups, and as a table's last",
             (16, 40, 7, 95), 6, num_groups=2, news=((0, 0, 1), (0, 1, 1), (1, 1, 0), (3, 0, 5)), pending=(0, 3)),
    StepCase("known_and_codes", "a token that must not be written, and tokens of pictures", (15, 33, 50), 4, known=(0, 2), codes=(1, 2)),
    StepCase("wide", "tables of several tiles, the new block in a later one", (1600, 2047 + 600, 3), 4, 3, 2600, 1,
             news=((0, 2, 1600), (1, 0, 2047)), num_updates=1500),
    StepCase("odd_blocks", "a block size that is no power of two", (11, 12, 70), 3, 2, 6, 12, news=((1, 1, 1),)),
    StepCase("bench", "a full batch of decodes at two thousand tokens", tuple(range(1900, 2156)), 256, 2, 512, scale="bench"),
)  # fmt: skip


def build(case: StepCase, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Tensor, StepState, StepRows]:
    """(numbers, state, rows): all that a kernel may write starts with numbers that it would not."""
    generator = torch.Generator().manual_seed(seed)
    count, num_groups, num_rows = len(case.starts), case.num_groups, 2 * case.size + 3

    def whole(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(1000, 9000, shape, generator=generator).to(device, dtype)

    numbers = torch.randint(-9, 9, (NUM_FIELDS + 2 * num_groups, case.size), generator=generator, dtype=torch.int32)
    numbers[ROW] = -1
    numbers[ROW, :count] = torch.randperm(num_rows, generator=generator)[:count]
    numbers[START, :count] = torch.tensor(case.starts, dtype=torch.int32)
    numbers[TOKEN, :count] = torch.randint(500, (count,), generator=generator, dtype=torch.int32)
    for field, chosen, value in ((TOKEN, case.pending, -1), (KNOWN, case.known, 1)):
        if field == KNOWN:
            numbers[field, :count] = 0
        numbers[field, list(chosen)] = value
    numbers[GRID_START, :count] = -1
    numbers[GRID_START, list(case.codes)] = 2
    numbers[NUM_FIELDS : NUM_FIELDS + num_groups, :count] = -1
    for row, group, column in case.news:
        numbers[NUM_FIELDS + group, row] = column
        numbers[NUM_FIELDS + num_groups + group, row] = 9000 + row
    state = StepState(whole(num_rows, dtype=torch.int64), whole(num_groups, num_rows, case.width))
    int64 = torch.int64
    rows = StepRows(
        ids=whole(case.size, dtype=int64),
        positions=whole(case.size, dtype=int64),
        slots=whole(num_groups, case.size, dtype=int64),
        context_len=whole(case.size),
        grid_start=whole(case.size),
        block_table=whole(num_groups, case.size, case.width),
    )
    return numbers.to(device), state, rows


def build_updates(case: StepCase, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """(tables [G, N, W], updates int64 [2, n])."""
    _, state, _ = build(case, device, seed)
    places = torch.randperm(state.tables.numel(), generator=torch.Generator().manual_seed(seed))[: case.num_updates]
    return state.tables, torch.stack((places, 9000 + torch.arange(len(places)))).to(device)
