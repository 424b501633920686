"""Scheduler and runner together, without processes or HTTP: what the engine loop does, for tests that look at ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from service.model.transformer import Transformer
from service.runner.kv_cache import KVCache, partition_layers
from service.runner.runner import Runner
from service.scheduling.sampling import SamplingParams
from service.scheduling.scheduler import Scheduler
from service.scheduling.sequence import Request


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
    kv_dtype: torch.dtype = torch.bfloat16,
) -> Generated:
    """All prompts at once, to the end of each. num_blocks: few of them make the scheduler preempt."""
    layout = partition_layers(model.config)
    cpu = torch.device("cpu")
    cache = KVCache(model.config, layout, num_blocks=num_blocks, block_size=16, dtype=kv_dtype, device=cpu)
    runner = Runner(model, cache, num_groups=len(layout.groups), device=cpu)
    scheduler = Scheduler(
        num_blocks=num_blocks,
        block_size=16,
        groups=layout.groups,
        max_batch_tokens=max_batch_tokens,
        max_sequences=64,
        max_context=model.config.max_context,
        pictures=model.config.pictures,
    )
    result = Generated([[] for _ in prompts], cached_tokens=[0] * len(prompts))
    for number, prompt in enumerate(prompts):
        scheduler.add(Request(str(number), (tuple(prompt),), sampling), now=0.0)
    while scheduler.has_work:
        plan, _ = scheduler.plan(0.0)
        assert plan is not None
        for output in scheduler.commit(plan, runner.sample(runner.forward(plan)), 0.0):
            if output.token is not None:
                result.ids[int(output.request_id)].append(output.token)
            if output.usage is not None:
                assert output.finish in ("stop", "length")
                result.cached_tokens[int(output.request_id)] = output.usage.cached_tokens
    scheduler.check()
    result.preemptions = scheduler.stats.preemptions
    return result
