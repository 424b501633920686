"""Plans that a real scheduler makes of random requests, and what several runners make of them: the ground for tests of state and graphs.

Drawn ids are random, so the same plans come whatever a runner computes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bench.models import RandomSource
from kernels.compose import compose
from kernels.ops import Ops, Weight, select_ops
from kernels.reference_ops import REFERENCE_FINE_OPS
from service.model.config import LayerAttention, ModelConfig
from service.model.transformer import Precision, build_transformer
from service.runner.kv_cache import KVCache, partition_layers
from service.runner.runner import Runner
from service.scheduling.plan import PENDING, Drawn, Slice, StepPlan
from service.scheduling.sampling import SamplingParams
from service.scheduling.scheduler import Request, Scheduler
from service.vocabulary import PictureIds

BLOCK_SIZE = 4
PICTURES = PictureIds(100, 20, 3, 4, 1, 2, 3)
PLAIN = ModelConfig(
    vocab_size=128,
    width=24,
    feed_forward_width=32,
    num_heads=2,
    num_kv_heads=1,
    head_width=16,
    layers=(LayerAttention(), LayerAttention()),
    max_context=64,
    has_tied_head=True,
)
CONFIGS = {
    "plain": PLAIN,
    "windows": replace(PLAIN, layers=(LayerAttention(window=10, sink=4), LayerAttention())),
    "pictures": replace(PLAIN, layers=(LayerAttention(window=10, radius=(1, 1)), LayerAttention()), pictures=PICTURES),
}


def row_by_row_ops() -> Ops:
    """Plain PyTorch with products of one row at a time, so that a row's bits don't depend on the others."""

    def linear(x: Tensor, weight: Weight) -> Tensor:
        return torch.cat([REFERENCE_FINE_OPS.linear(row, weight) for row in x.split(1)])

    return replace(compose("rows", replace(REFERENCE_FINE_OPS, linear=linear)), step=select_ops("reference").step)


def build_runner(
    config: ModelConfig, num_blocks: int, ops: Ops | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Runner:
    """Its K/V pool holds noise, so that what is written and what is read by mistake shows."""
    where = torch.device(device)
    with torch.inference_mode():
        model = build_transformer(config, RandomSource(config, where), ops or row_by_row_ops(), precision=Precision(dtype), device=where)
    layout = partition_layers(config)
    cache = KVCache(config, layout, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=dtype, device=where)
    cache.pool.normal_(generator=torch.Generator(where).manual_seed(1))
    return Runner(model, cache, num_groups=len(layout.groups), device=where)


@dataclass
class Served:
    """Requests come and go at random. pending, known, drafted, lost: how often a plan had such; a test says what it relies on."""

    config: ModelConfig
    num_blocks: int
    max_sequences: int
    seed: int
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("pending", "known", "drafted", "gangs", "codes", "lost"), 0))

    def steps(self, count: int) -> Iterator[tuple[StepPlan, StepPlan, list[int]]]:
        """(the plan as the scheduler made it, the same with some ids PENDING, the ids drawn for its samples), step by step."""
        chance = random.Random(self.seed)
        groups = partition_layers(self.config).groups
        scheduler = Scheduler(
            num_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
            groups=groups,
            max_batch_tokens=24,
            max_sequences=self.max_sequences,
            max_context=self.config.max_context,
            pictures=self.config.pictures,
        )
        newest: dict[int, int] = {}  # position of the id drawn last, by sequence of the last step's samples
        for now in range(count):
            if scheduler.num_waiting < 2 and chance.random() < 0.3:
                scheduler.add(self._request(str(now), chance), now)
            if chance.random() < 0.03:
                scheduler.abort(str(chance.randrange(now + 1)), None, "abort", now)
            plan, _ = scheduler.plan(now)
            if plan is None:
                continue
            drawn = [chance.choice((5, 6, 7, *range(100, 104))) for _ in plan.samples]
            hidden = tuple(self._hide(piece, newest, chance) for piece in plan.slices)
            yield plan, replace(plan, slices=hidden), drawn
            newest = {plan.slices[at].sequence_id: one.position for one in plan.samples for at in one.slice_indexes}
            drafting = {plan.slices[at].sequence_id for one in plan.samples if one.back for at in one.slice_indexes}
            newest = {sequence: position for sequence, position in newest.items() if sequence not in drafting}
            self._count(plan, bool(drafting))
            scheduler.commit(plan, [Drawn(token) for token in drawn], now)
            self.counts["lost"] = scheduler.stats.preemptions

    def _request(self, name: str, chance: random.Random) -> Request:
        prompt = tuple(chance.choice((5, 6, 7, 8, *range(100, 108))) for _ in range(chance.choice((1, 3, 8, 8, 19, 40))))
        if chance.random() < 0.4:
            prompt = (5, 6, 7, 8) * 2  # asked again, so a prefix is found
        prompts = (prompt, prompt[-3:]) if chance.random() < 0.3 else (prompt,)
        params = SamplingParams(max_tokens=chance.randint(2, 20))
        return Request(name, prompts, params, guidance=2.0, draft_len=chance.choice((0, 0, 3)))

    def _hide(self, piece: Slice, newest: dict[int, int], chance: random.Random) -> Slice:
        last = piece.start + len(piece.tokens) - 1
        if newest.get(piece.sequence_id) != last or chance.random() < 0.2:
            return piece
        self.counts["pending"] += 1
        return replace(piece, tokens=(*piece.tokens[:-1], PENDING))

    def _count(self, plan: StepPlan, is_drafting: bool) -> None:
        self.counts["drafted"] += is_drafting
        self.counts["known"] += sum(piece.is_first_known for piece in plan.slices)
        self.counts["gangs"] += sum(len(one.slice_indexes) == 2 for one in plan.samples)
        self.counts["codes"] += sum(bool(piece.grid_starts) for piece in plan.slices)
