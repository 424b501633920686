"""Runs plans: builds inputs, calls the model, samples. Owns the device: weights, K/V pool, state between steps, graphs, sampler.

What may not come in: requests, text, queues, clocks, anything of one model family. Called by the engine loop with the verbs
`forward(plan)`, `draw(handle)` (or `sample`, which waits) and `read(handle)`, so that masks may arrive late, and the next step be planned
and begun before the ids of this one are known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.model.transformer import Transformer
from service.runner.drawing import Drawing
from service.runner.graphs import CudaRecorder, DecodeGraphs, GraphLimits, Recorder
from service.runner.inputs import StepInputs, build_inputs
from service.runner.kv_cache import KVCache
from service.runner.reader import Reader
from service.runner.sampler import Sampler, can_draw
from service.runner.state import Rows, StateTable
from service.scheduling.plan import Drawn, PromptReading, RunnerCounts, StepPlan

if TYPE_CHECKING:  # it runs runners
    from service.runner.warmup import CompileWatch


@dataclass(frozen=True, slots=True)
class Handle:
    """A step whose kernels have been issued: its plan, and of the slices that its samples name the final hidden states [R, D], of which
    logits may never be written. states: what the layers gave, (x, residual) of all tokens [T, D]; only where prompts are read."""

    plan: StepPlan
    hidden: Tensor | None = None
    states: tuple[Tensor, Tensor] | None = None


class Runner:
    def __init__(self, model: Transformer, cache: KVCache, *, num_groups: int, device: torch.device) -> None:
        self.model = model
        self.cache = cache
        self.num_groups = num_groups
        self.device = device
        self.state = StateTable(device)
        self.sampler = Sampler(model.ops, model.config.vocab_size, device, self.state.last_id)
        self.reader = Reader(model, device)
        self.graphs: DecodeGraphs | None = None
        self.compiles: CompileWatch | None = None
        self.num_compiles = 0

    def counts(self) -> RunnerCounts:
        if self.graphs is None:
            return RunnerCounts(kernel_compiles=self.num_compiles)
        return RunnerCounts(self.graphs.num_replays, self.graphs.num_misses, self.num_compiles)

    def watch_compiles(self, watch: CompileWatch) -> None:
        """Counts from now on, also kernels that have to be compiled in one of this runner's steps."""
        self.compiles = watch
        if self.graphs is not None:
            self.graphs.num_replays = self.graphs.num_misses = 0

    def capture_graphs(
        self, max_sequences: int, recorder: Recorder | None = None, progress: Callable[[float], None] = lambda fraction: None
    ) -> None:
        """Records decode steps as CUDA graphs, up to the final hidden states; call once, before the first plan. recorder: another one than
        CUDA's.

        What follows depends on what the samples ask for, and need not be in the graph: the head's kernel and the choice are two launches,
        four with filters. In the graph, every step would write logits twice, and read them once, for rows that nobody may sample: of 64
        rows and 128,256 ids 66 MB, beside 33 MB of scores where there are filters and nothing where there are none.

        Raises: ValueError when the back end has no kernels that prepare a step on the device.
        """
        step_ops, config = self.model.ops.step, self.model.config
        if step_ops is None:
            raise ValueError(f"the back end {self.model.ops.name!r} does not prepare steps on the device")
        limits = GraphLimits(self.num_groups, self.cache.block_size, config.max_context, max_sequences, config.pictures is not None)
        with torch.inference_mode():
            self.graphs = DecodeGraphs(self._compute, limits, self.state, step_ops, recorder or CudaRecorder())
            self.graphs.capture(progress)

    def forward(self, plan: StepPlan) -> Handle:
        """Mutates: the K/V pool, at the plan's slots. Raises: ValueError for a pending id that was not drawn here."""
        self.sampler.release(plan.released)
        self.reader.release(plan.released)
        self.state.release(plan.released)
        if not plan.slices:  # a step may only encode pictures
            return Handle(plan)
        if self.compiles is not None:
            self.compiles.of = self
        with torch.inference_mode():
            rows = self.state.admit(plan.slices)
            try:
                return self._forward(plan, rows)
            except Exception:
                self.state.forget_tables(rows)
                raise

    def _forward(self, plan: StepPlan, rows: Rows) -> Handle:
        hidden = None if self.graphs is None else self.graphs.run(plan, rows)
        if hidden is not None:
            return Handle(plan, hidden if plan.samples else None)
        inputs = self._build(plan, rows)
        x, residual = self._run_layers(inputs)
        return Handle(plan, self._hidden(x, residual, inputs), states=(x, residual) if plan.reads else None)

    def _build(self, plan: StepPlan, rows: Rows) -> StepInputs:
        """Of a step that no graph runs."""
        tables = None if self.state.tables is None else self.state.block_tables(plan.slices, rows)
        inputs = build_inputs(plan, self.num_groups, self.cache.block_size, self.device, tables)
        self.state.resolve(plan.slices, rows, inputs.ids)
        return inputs

    def sample(self, handle: Handle, masks: NDArray[np.int32] | None = None) -> list[Drawn]:
        """One `Drawn` per sample of the plan, in its order. masks int32 [R, ceil(V / 32)], a row per sample, or None."""
        return self._draw(handle, masks).wait()

    def draw(self, handle: Handle, masks: NDArray[np.int32] | None = None) -> Drawing:
        """`sample`, of which `wait` is the rest. The ids are those that later plans mean by `PENDING`."""
        drawing = self._draw(handle, masks)
        self.state.keep(handle.plan, drawing.ids)
        return drawing

    def _draw(self, handle: Handle, masks: NDArray[np.int32] | None) -> Drawing:
        with torch.inference_mode():
            bits = None if masks is None else torch.from_numpy(masks)
            if handle.hidden is not None and can_draw(handle.plan) and not self.model.config.logit_softcap:
                return self.sampler.draw(handle.hidden, self.model.head, handle.plan, bits)
            return self.sampler.sample(self.logits(handle), handle.plan, bits)

    def logits(self, handle: Handle) -> Tensor:
        """float32 [R, V] of the slices that the plan's samples name; empty when nothing is sampled."""
        if handle.hidden is None:
            return torch.empty((0, self.model.config.vocab_size), dtype=torch.float32, device=self.device)
        return self.model.project(handle.hidden)

    def read(self, handle: Handle) -> list[PromptReading]:
        """One `PromptReading` per read of the plan, in its order."""
        if handle.states is None:
            return []
        with torch.inference_mode():
            return self.reader.read(handle.plan, *handle.states)

    def _compute(self, inputs: StepInputs) -> Tensor:
        """The final hidden states [R, D] of inputs.rows."""
        return self.model.hidden(*self._run_layers(inputs), inputs.rows)

    def _run_layers(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        return self.model.forward(inputs.ids, inputs.positions, self.cache.of_layers(inputs.batches))

    def _hidden(self, x: Tensor, residual: Tensor, inputs: StepInputs) -> Tensor | None:
        """None when nothing is sampled."""
        return self.model.hidden(x, residual, inputs.rows) if inputs.rows.numel() else None
