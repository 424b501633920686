"""Scheduler and runner together, without processes or HTTP: what the engine loop does, for tests that look at ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from service.engine.picture_masks import PictureMasks
from service.model.transformer import Transformer
from service.runner.drawing import Drawing
from service.runner.kv_cache import KVCache, partition_layers
from service.runner.runner import Handle, Runner
from service.scheduling.picture_grammar import PictureGrammar
from service.scheduling.plan import PENDING, StepPlan
from service.scheduling.sampling import SamplingParams
from service.scheduling.scheduler import Scheduler
from service.scheduling.sequence import Request, Usage


@dataclass
class Generated:
    """ids of each request, in order; what happened on the way."""

    ids: list[list[int]]
    preemptions: int = 0
    cached_tokens: list[int] = field(default_factory=list)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    num_blocks: int = 2048,
    max_batch_tokens: int = 512,
    kv_dtype: torch.dtype = torch.int8,
) -> Generated:
    """All prompts at once, to the end of each. num_blocks: few of them make the scheduler preempt."""
    desk = Desk(model, num_blocks=num_blocks, max_batch_tokens=max_batch_tokens, kv_dtype=kv_dtype)
    desk.run([Request(str(number), (tuple(prompt),), sampling) for number, prompt in enumerate(prompts)])
    names = [str(number) for number in range(len(prompts))]
    cached = [desk.usages[name, 0].cached_tokens for name in names]
    return Generated([desk.ids[name, 0] for name in names], desk.scheduler.stats.preemptions, cached)


class Desk:
    """A scheduler and a runner that live on from run to run, so that later requests meet what earlier ones left in the prefix cache.
    is_ahead: steps are begun before the ids of those in front are known."""

    def __init__(
        self,
        model: Transformer,
        *,
        num_blocks: int = 2048,
        max_batch_tokens: int = 512,
        kv_dtype: torch.dtype = torch.int8,
        is_ahead: bool = False,
    ) -> None:
        layout = partition_layers(model.config)
        cpu, pictures = torch.device("cpu"), model.config.pictures
        cache = KVCache(model.config, layout, num_blocks=num_blocks, block_size=16, dtype=kv_dtype, device=cpu)
        self.runner = Runner(model, cache, num_groups=len(layout.groups), device=cpu)
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=16,
            groups=layout.groups,
            max_batch_tokens=max_batch_tokens,
            max_sequences=64,
            max_context=model.config.max_context,
            pictures=pictures,
            max_drafting=64,
        )
        self.masks = PictureMasks(pictures, model.config.vocab_size) if pictures is not None else None
        self.ids: dict[tuple[str, int], list[int]] = {}
        self.usages: dict[tuple[str, int], Usage] = {}
        self.is_ahead = is_ahead
        self.num_steps = self.num_pending = 0
        self.most_used = [0] * len(layout.groups)

    def run(self, requests: Sequence[Request]) -> None:
        """To the end of each. Mutates: ids and usages, by request and choice."""
        scheduler = self.scheduler
        for request in requests:
            scheduler.add(request, now=0.0)
            self.ids |= {(request.request_id, choice): [] for choice in range(request.num_choices)}
        before: tuple[StepPlan, Drawing] | None = None
        while scheduler.has_work or before is not None:
            plan, _ = scheduler.plan(0.0, is_ahead=before is not None)
            assert plan is not None or before is not None
            handle = None if plan is None else self._begin(plan)
            if before is not None:
                self._commit(*before)
            before = None
            if plan is not None and handle is not None:
                before = plan, self.runner.draw(handle, self._masks(plan))
            if before is not None and not self.is_ahead:
                self._commit(*before)
                before = None
        scheduler.check()

    def _begin(self, plan: StepPlan) -> Handle:
        self.num_steps += 1
        self.num_pending += sum(piece.tokens[-1] == PENDING for piece in plan.slices)
        for group in range(len(self.most_used)):
            held = {block for piece in plan.slices for block in piece.tables[group] if block >= 0}
            self.most_used[group] = max(self.most_used[group], len(held))
        return self.runner.forward(plan)

    def _commit(self, plan: StepPlan, drawing: Drawing) -> None:
        for output in self.scheduler.commit(plan, drawing.wait(), 0.0):
            if output.token is not None:
                self.ids[output.request_id, output.choice].append(output.token)
            if output.usage is not None:
                assert output.finish in ("stop", "length"), output
                self.usages[output.request_id, output.choice] = output.usage

    def _masks(self, plan: StepPlan) -> NDArray[np.int32] | None:
        grammars = self.scheduler.grammars(plan)
        if self.masks is None or not any(grammars):
            return None
        masks = self.masks.everything(len(grammars))
        for row, grammar in enumerate(grammars):
            if isinstance(grammar, PictureGrammar):
                masks[row] = self.masks.rows[grammar.allowed]
        return masks
