"""CUDA graphs of whole decode steps: captured once per padded batch size, inputs prepared by a kernel inside.

Only for steps in which every slice has one token. The host writes a few numbers a row, copies them at once, and replays. A padded row has
slot -1 (writes nothing) and context length 0. What needs CUDA is behind `Recorder`. Used by the runner on CUDA alone.
Shape suffixes: S rows of a step (one token each), G K/V groups, W blocks in the widest table, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import PagedBatch, StepOps, StepRows
from kernels.step.reference import GRID_START, KNOWN, NUM_FIELDS, ROW, START, TOKEN
from service.runner.inputs import StepInputs, copy_into, on_device
from service.runner.state import Rows, StateTable
from service.scheduling.plan import Slice, StepPlan

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
Compute = Callable[[StepInputs], Tensor]


class Replayable(Protocol):
    def replay(self) -> None: ...


class Recorder(Protocol):
    def capture(self, launch: Callable[[], Tensor]) -> tuple[Replayable, Tensor]:
        """Records what launch does on the device. A replay does it again, and leaves its result in the tensor returned."""


class CudaRecorder:
    """Every graph shares one memory pool; with the largest captured first, the others fit in its memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # one: memory is kept for each

    def capture(self, launch: Callable[[], Tensor]) -> tuple[Replayable, Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # the first launch of a kernel compiles it, which must not be captured
                launch()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = launch()
        return graph, output


@dataclass(frozen=True, slots=True)
class Captured:
    graph: Replayable
    output: Tensor  # [S, ...]


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """Of the steps that graphs are captured for. has_pictures: they may hold codes, so a graph looks where their pictures begin, with or
    without any. max_context in tokens: grids come from it, so a graph captured on short contexts is right for long ones."""

    num_groups: int
    block_size: int
    max_context: int
    max_sequences: int
    has_pictures: bool = False


class DecodeGraphs:
    """compute: inputs -> a tensor with a row for each of them, launching kernels only; what `run` gives are rows of it. state: holds the
    block tables from now on. num_replays: steps that were run by a graph. num_misses: steps of decodes alone that could not be."""

    def __init__(self, compute: Compute, limits: GraphLimits, state: StateTable, ops: StepOps, recorder: Recorder) -> None:
        self.compute = compute
        self.limits = limits
        self.state = state
        self.ops = ops
        self.recorder = recorder
        most = min(limits.max_sequences, BATCH_SIZES[-1])
        self.sizes = (*(size for size in BATCH_SIZES if size < most), most)  # the last one holds every step there can be
        self.captured: dict[int, Captured] = {}
        self.num_replays = 0
        self.num_misses = 0
        width = -(-limits.max_context // limits.block_size)
        state.hold_tables(ops, limits.num_groups, width, limits.max_sequences)
        largest, device = self.sizes[-1], state.device
        # One set of inputs for all sizes, each of which uses its first rows; the numbers of a smaller one lie closer together.
        self._num_numbers = NUM_FIELDS + 2 * limits.num_groups
        self._numbers = torch.full((self._num_numbers * largest,), -1, dtype=torch.int32, device=device)
        self._query_start = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self._every_row = torch.arange(largest, dtype=torch.int64, device=device)
        self._rows = StepRows(
            ids=torch.zeros(largest, dtype=torch.int64, device=device),
            positions=torch.zeros(largest, dtype=torch.int64, device=device),
            slots=torch.full((limits.num_groups, largest), -1, dtype=torch.int64, device=device),
            context_len=torch.zeros(largest, dtype=torch.int32, device=device),
            grid_start=torch.full((largest,), -1, dtype=torch.int32, device=device),
            block_table=torch.zeros((limits.num_groups, largest, width), dtype=torch.int32, device=device),
        )

    def capture(self, progress: Callable[[float], None] = lambda fraction: None) -> None:
        """Warms the kernels up and records every size. Nothing is written to the K/V pool: all rows are padding."""
        for number, size in enumerate(reversed(self.sizes)):
            progress(number / len(self.sizes))
            graph, output = self.recorder.capture(partial(self._launch, size))
            self.captured[size] = Captured(graph, output)

    def run(self, plan: StepPlan, rows: Rows) -> Tensor | None:
        """What compute gives for the slices that the plan's samples name, in that order; valid until the next call. None for a step that
        has to be run without a graph. rows: of the state, a slice each. Mutates: K/V at the step's slots, the counts.

        Raises: ValueError for an id that is pending and was not drawn here.
        """
        count = len(plan.slices)
        if len(plan.slices[-1].tokens) > 1:  # those with one token come first
            return None
        if plan.reads or count > self.sizes[-1]:  # a graph keeps no hidden states
            self.num_misses += 1
            return None
        size = next(size for size in self.sizes if size >= count)
        copy_into(self._describe(plan.slices, rows, size), self._numbers_of(size))
        captured = self.captured[size]
        captured.graph.replay()
        self.num_replays += 1
        wanted = [index for sample in plan.samples for index in sample.slice_indexes]
        if wanted == list(range(len(wanted))):
            return captured.output[: len(wanted)]
        return captured.output[on_device(np.array(wanted, dtype=np.int64), self.state.device)]

    def _describe(self, slices: tuple[Slice, ...], rows: Rows, size: int) -> NDArray[np.int32]:
        """int32 [5 + 2 * G, S], as `StepOps.prepare` takes them. Mutates: the state, which counts new blocks as sent."""
        count, first_block = len(slices), NUM_FIELDS + self.limits.num_groups
        numbers = np.full((self._num_numbers, size), -1, dtype=np.int32)
        numbers[START, :count] = [piece.start for piece in slices]
        numbers[TOKEN, :count] = tokens = np.array([piece.tokens[0] for piece in slices], dtype=np.int32)
        numbers[KNOWN, :count] = [piece.is_first_known for piece in slices]
        if self.limits.has_pictures:
            numbers[GRID_START, :count] = [piece.grid_starts[0] if piece.grid_starts else -1 for piece in slices]
        self.state.require_ids(rows[tokens < 0])
        numbers[ROW, :count] = rows
        numbers[NUM_FIELDS:first_block, :count], numbers[first_block:, :count] = self.state.new_blocks(slices, rows)
        return numbers

    def _numbers_of(self, size: int) -> Tensor:
        """int32 [5 + 2 * G, S]"""
        return self._numbers[: self._num_numbers * size].view(self._num_numbers, size)

    def _launch(self, size: int) -> Tensor:
        """A step of this size, whatever the numbers say: first its inputs, then what is computed of them."""
        rows, limits = self._rows, self.limits
        first = StepRows(
            ids=rows.ids[:size],
            positions=rows.positions[:size],
            slots=rows.slots[:, :size],
            context_len=rows.context_len[:size],
            grid_start=rows.grid_start[:size],
            block_table=rows.block_table[:, :size],
        )
        self.ops.prepare(self._numbers_of(size), self.state.on_device, first, limits.block_size)
        batches = [
            PagedBatch(
                slots=slots,
                block_table=block_table,
                query_start=self._query_start[: size + 1],
                context_len=first.context_len,
                num_decodes=size,
                max_query_len=0,
                max_context_len=limits.max_context,
                grid_start=first.grid_start if limits.has_pictures else None,
            )
            for slots, block_table in zip(first.slots, first.block_table, strict=True)
        ]
        return self.compute(StepInputs(first.ids, first.positions, batches, self._every_row[:size]))
