"""One model in this process, stepped as the engine's loop steps its lane, without mailbox and messages: for benchmarks of steps.

Used by `bench.pictures`, `bench.speculation` and `bench.offline`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from service.catalog import resolve
from service.engine.messages import Load, ModelSource
from service.model.layers import DecoderLayer
from service.model.transformer import Transformer
from service.runner.kv_cache import KVCache, partition_layers
from service.runner.load import Loaded, load_models
from service.runner.runner import Runner
from service.scheduling.picture_grammar import PictureGrammar
from service.scheduling.plan import StepPlan
from service.scheduling.sampling import SamplingParams
from service.scheduling.sequence import Request
from service.worker import build_lane


def load_lane(name: str, *, has_prefix_cache: bool = True, max_sequences: int = 64) -> tuple[Loaded, Load]:
    """A model, named as for `braid serve` and loaded as there, and the message that loaded it."""
    message = Load(
        models=(ModelSource(name, str(resolve(name).path)),),
        dtype="auto",
        device="auto",
        memory_bytes=0,
        max_context=0,
        max_batch_tokens=512,
        max_sequences=max_sequences,
        prefix_cache=has_prefix_cache,
    )
    return load_models(message, lambda phase, fraction: None)[0], message


def with_draft(loaded: Loaded, layers: Sequence[int]) -> Loaded:
    """The model with a draft model made of some of its own layers, which shares their weights."""
    runner = loaded.runner
    if not isinstance(runner, Runner):
        raise TypeError("an encoder has nothing to guess")
    model, cache = runner.model, runner.cache
    config = replace(model.config, layers=tuple(model.config.layers[index] for index in layers))
    weights = [cast(DecoderLayer, model.layers[index]).weights for index in layers]
    small = Transformer(config, model.ops, weights, model.final_norm, (model.embedding, model.head), model.basis)
    layout = partition_layers(config)
    num_blocks = 4 * -(-config.max_context // cache.block_size) * len(layout.groups)
    own = KVCache(config, layout, num_blocks=num_blocks, block_size=cache.block_size, dtype=cache.pool.dtype, device=runner.device)
    draft_runner = Runner(small, own, num_groups=len(layout.groups), device=runner.device)
    info = msgspec.structs.replace(loaded.info, name="draft", num_kv_blocks=num_blocks)
    return replace(loaded, draft=Loaded(info, draft_runner, layout.groups))


class Loop:
    """durations: of its steps, in seconds. ids: drawn for each request. max_drafting: sequences, above which nothing is guessed; 0 for what
    is usual."""

    def __init__(self, loaded: Loaded, message: Load, max_drafting: int = 0) -> None:
        self.lane = build_lane(loaded, message)
        self.scheduler = self.lane.scheduler
        if max_drafting:
            self.scheduler._roster.max_drafting = max_drafting
        self.durations: list[float] = []
        self.ids: dict[str, list[int]] = {}
        self.is_painting = False

    def add(
        self, name: str, prompt: Sequence[int], params: SamplingParams, *, draft_len: int = 0, grammar: PictureGrammar | None = None
    ) -> None:
        grammars = () if grammar is None else (grammar,)
        self.scheduler.add(Request(name, (tuple(prompt),), params, grammars=grammars, draft_len=draft_len), 0.0)
        self.ids[name] = []

    def step(self) -> None:
        lane, start = self.lane, time.perf_counter()
        if lane.painter is not None and (results := lane.painter.finished()):
            self.scheduler.commit_pictures(results, 0.0)
            self.is_painting = False
        guesses = lane.drafting.guess(self.scheduler.draft_wishes()) if lane.drafting is not None else None
        plan, _ = self.scheduler.plan(0.0, guesses)
        if plan is None:
            return
        if lane.painter is not None and (work := (*plan.encode, *plan.draw)):
            lane.painter.begin(work)
            self.is_painting = True
        drawn = lane.runner.sample(lane.runner.forward(plan), self._masks(plan))
        for output in self.scheduler.commit(plan, drawn, 0.0):
            if output.token is not None:
                self.ids[output.request_id].append(output.token)
        if lane.drafting is not None:
            lane.drafting.learn(plan)
        self.durations.append(time.perf_counter() - start)

    def _masks(self, plan: StepPlan) -> NDArray[np.int32] | None:
        if self.lane.masks is None:
            return None
        grammars = self.scheduler.grammars(plan)
        masks = self.lane.masks.everything(len(grammars))
        for row, grammar in enumerate(grammars):
            if isinstance(grammar, PictureGrammar):
                masks[row] = self.lane.masks.rows[grammar.allowed]
        return masks
