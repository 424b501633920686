"""Runs plans: builds inputs, calls the model, samples. Owns the device: weights, K/V pool, graphs, sampler.

What may not come in: requests, text, queues, clocks, anything of one model family. Called by the engine loop with two verbs,
`forward(plan)` and `sample(handle)`, so that masks may arrive late and the next step can be planned meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from service.model.transformer import Transformer
from service.runner.graphs import DecodeGraphs
from service.runner.inputs import StepInputs, build_inputs
from service.runner.kv_cache import KVCache
from service.runner.sampler import Sampler
from service.scheduling.plan import Drawn, StepPlan


@dataclass(frozen=True, slots=True)
class Handle:
    """A step whose kernels have been issued: its plan, and the logits float32 [R, V] of the slices that its samples name."""

    plan: StepPlan
    logits: Tensor


class Runner:
    def __init__(self, model: Transformer, cache: KVCache, *, num_groups: int, device: torch.device) -> None:
        self.model = model
        self.cache = cache
        self.num_groups = num_groups
        self.device = device
        self.sampler = Sampler(model.ops, model.config.vocab_size, device)
        self.graphs: DecodeGraphs | None = None

    def capture_graphs(self, max_sequences: int) -> None:
        """Records decode steps as CUDA graphs; call once, before the first plan."""
        with torch.inference_mode():
            self.graphs = DecodeGraphs(
                self._compute,
                num_groups=self.num_groups,
                max_context=self.model.config.max_context,
                block_size=self.cache.block_size,
                max_sequences=max_sequences,
                device=self.device,
            )
            self.graphs.capture()

    def forward(self, plan: StepPlan) -> Handle:
        """Mutates: the K/V pool, at the plan's slots."""
        self.sampler.release(plan.released)
        if not plan.slices:  # a step may only encode pictures
            return Handle(plan, torch.empty((0, self.model.config.vocab_size), device=self.device))
        with torch.inference_mode():
            inputs = build_inputs(plan, self.num_groups, self.cache.block_size, self.device)
            if self.graphs is not None and self.graphs.can_run(inputs):
                logits = self.graphs.run(inputs)[inputs.rows]
            else:
                logits = self._compute(inputs)
        return Handle(plan, logits)

    def sample(self, handle: Handle, masks: Tensor | None = None) -> list[Drawn]:
        """One `Drawn` per sample of the plan, in its order. masks int32 [R, ceil(V / 32)] or None."""
        with torch.inference_mode():
            return self.sampler.sample(handle.logits, handle.plan, masks)

    def _compute(self, inputs: StepInputs) -> Tensor:
        """Logits float32 [R, V] of inputs.rows; an empty tensor when nothing is sampled."""
        kv = self.cache.of_layers(inputs.batches)
        x, residual = self.model.forward(inputs.ids, inputs.positions, kv)
        if not inputs.rows.numel():
            return x.new_empty((0, self.model.config.vocab_size), dtype=torch.float32)
        return self.model.logits(x, residual, inputs.rows)
