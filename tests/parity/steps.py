"""Drives a model through hand-made steps and returns the logits of every token, so that any way of cutting a text can be compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.model.transformer import Transformer
from service.runner.inputs import build_inputs
from service.runner.kv_cache import KVCache, partition_layers
from service.scheduling.plan import Slice, StepPlan


class Steps:
    """A model with a small K/V pool. Sequence s owns blocks spread through the pool, so that a wrong table shows."""

    def __init__(
        self,
        model: Transformer,
        *,
        block_size: int = 4,
        num_blocks: int = 96,
        dtype: torch.dtype = torch.float32,
        local_dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.model = model
        self.layout = partition_layers(model.config, local_dtype)
        self.cache = KVCache(model.config, self.layout, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=self.device)
        self.free = list(range(num_blocks))[::-2] + list(range(num_blocks))[num_blocks % 2 :: 2]
        self.tables: dict[int, list[list[int]]] = {}
        self.lengths: dict[int, int] = {}
        self.grid_starts: dict[int, list[int]] = {}

    def share(self, source: int, target: int, num_tokens: int) -> None:
        """Lets target start with source's first blocks: a prefix hit."""
        count = num_tokens // self.cache.block_size
        self.tables[target] = [table[:count] for table in self.tables[source]]
        self.lengths[target] = count * self.cache.block_size
        self.grid_starts[target] = self.grid_starts[source][: self.lengths[target]]

    def forget(self, sequence: int) -> None:
        """Gives the blocks back as preemption does; their content is overwritten with rubbish."""
        for table in self.tables.pop(sequence):
            self.cache.pool[:, :, table] = 1e3 if self.cache.pool.itemsize > 1 else 100
            self.free.extend(table)
        del self.lengths[sequence], self.grid_starts[sequence]

    def run(self, pieces: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor]:
        """One step over (sequence, its next tokens) pairs; logits float32 [tokens, V] of each pair, in the order given."""
        order = sorted(range(len(pieces)), key=lambda i: len(pieces[i][1]) != 1)
        plan = StepPlan(0, tuple(self._slice(*pieces[i]) for i in order), ())
        with torch.inference_mode():
            inputs = build_inputs(plan, len(self.layout.groups), self.cache.block_size, self.device)
            x, residual = self.model(inputs.ids, inputs.positions, self.cache.of_layers(inputs.batches))
            logits = self.model.logits(x, residual, torch.arange(len(inputs.ids), device=self.device))
        parts = dict(zip(order, logits.split([len(pieces[i][1]) for i in order]), strict=True))
        return [parts[i] for i in range(len(pieces))]

    def _slice(self, sequence: int, tokens: Sequence[int]) -> Slice:
        start = self.lengths.setdefault(sequence, 0)
        tables = self.tables.setdefault(sequence, [[] for _ in self.layout.groups])
        end = start + len(tokens)
        for table in tables:
            while len(table) * self.cache.block_size < end:
                table.append(self.free.pop())
        self.lengths[sequence] = end
        return Slice(sequence, start, tuple(tokens), tuple(map(tuple, tables)), self._grid_starts(sequence, start, tokens))

    def _grid_starts(self, sequence: int, start: int, tokens: Sequence[int]) -> tuple[int, ...]:
        found = self.grid_starts.setdefault(sequence, [])
        if (pictures := self.model.config.pictures) is None:
            return ()
        found += pictures.grid_starts(tokens, start, found[-1] if found else -1)
        return tuple(found[start:]) if max(found[start:]) >= 0 else ()
