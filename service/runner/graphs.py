"""CUDA graphs of whole decode steps: captured once per padded batch size, replayed with lengths read from device memory.

Only for steps in which every slice has one token. A padded row has slot -1 (writes nothing) and context length 0. Used by the runner
on CUDA alone. Shape suffixes: S sequences (one token each), W blocks in the widest table, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import PagedBatch
from service.runner.inputs import StepInputs

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
Forward = Callable[[StepInputs], Tensor]


@dataclass(slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: StepInputs
    hidden: Tensor  # [S, D]


class DecodeGraphs:
    """Every captured batch size shares one memory pool; the largest is captured first, so that the others fit in its memory.

    forward: inputs -> final hidden states [S, D], launching kernels only. Grids come from max_context, so a graph captured on short
    contexts is right for long ones. has_pictures: steps may hold codes, so a graph looks where their pictures begin, with or without any.
    num_replays: steps run. num_misses: steps of one token a sequence that had to do without, which the runner counts.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        num_groups: int,
        has_pictures: bool = False,
        max_context: int,
        block_size: int,
        max_sequences: int,
        device: torch.device,
    ):
        self.forward = forward
        self.has_pictures = has_pictures
        self.num_groups = num_groups
        self.max_context = max_context
        self.table_width = -(-max_context // block_size)
        self.device = device
        self.sizes = tuple(size for size in BATCH_SIZES if size <= max_sequences) or (1,)
        self.captured: dict[int, _Captured] = {}
        self.num_replays = 0
        self.num_misses = 0

    def capture(self, progress: Callable[[float], None] = lambda fraction: None) -> None:
        """Warms the kernels up and records every size. Nothing is written to the K/V pool: all rows are padding."""
        pool = None
        for number, size in enumerate(reversed(self.sizes)):
            progress(number / len(self.sizes))
            inputs = self._static_inputs(size)
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # the first launch of a kernel compiles it, which must not be captured
                    self.forward(inputs)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                hidden = self.forward(inputs)
            pool = graph.pool()
            self.captured[size] = _Captured(graph, inputs, hidden)

    def can_run(self, inputs: StepInputs) -> bool:
        return inputs.is_all_decode and inputs.batches[0].num_decodes <= max(self.captured, default=0)

    def run(self, inputs: StepInputs) -> Tensor:
        """Final hidden states [S, D] of an all-decode step; valid until the next call. Mutates: K/V at the step's slots."""
        count = inputs.batches[0].num_decodes
        captured = self.captured[min(size for size in self.captured if size >= count)]
        static = captured.inputs
        static.ids[:count].copy_(inputs.ids, non_blocking=True)
        static.positions[:count].copy_(inputs.positions, non_blocking=True)
        for target, source in zip(static.batches, inputs.batches, strict=True):
            _fill(target, source, count)
        captured.graph.replay()
        self.num_replays += 1
        return captured.hidden[:count]

    def _static_inputs(self, size: int) -> StepInputs:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        context_len = zeros(size)
        grid_start = zeros(size) - 1 if self.has_pictures else None
        query_start = torch.arange(size + 1, dtype=torch.int32, device=self.device)
        batches = [
            PagedBatch(
                slots=torch.full((size,), -1, dtype=torch.int64, device=self.device),
                block_table=zeros(size, self.table_width),
                query_start=query_start,
                context_len=context_len,
                num_decodes=size,
                max_query_len=0,
                max_context_len=self.max_context,
                grid_start=grid_start,
            )
            for _ in range(self.num_groups)
        ]
        rows = torch.arange(size, dtype=torch.int64, device=self.device)
        return StepInputs(zeros(size, dtype=torch.int64), zeros(size, dtype=torch.int64), batches, rows)


def _fill(target: PagedBatch, source: PagedBatch, count: int) -> None:
    """Copies a step's real rows into the static ones and turns the rest into padding."""
    target.slots[:count].copy_(source.slots, non_blocking=True)
    target.slots[count:].fill_(-1)
    target.context_len[:count].copy_(source.context_len, non_blocking=True)
    target.context_len[count:].zero_()
    if target.grid_start is not None:
        target.grid_start.fill_(-1)
        if source.grid_start is not None:
            target.grid_start[:count].copy_(source.grid_start, non_blocking=True)
    target.block_table[:count, : source.block_table.shape[1]].copy_(source.block_table, non_blocking=True)
