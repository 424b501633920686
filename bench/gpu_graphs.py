"""Part of `bench.gpu`: decode graphs against eager steps. Captured on nothing, replayed on short and long contexts, padded batches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bench.gpu_clock import Clock, NeedsDeviceError
from bench.gpu_score import Step
from bench.models import SHAPES, build_runner, step_of
from kernels.ops import select_ops

CONTEXTS = (1, 17, 300, 2047)


def steps(clock: Clock) -> list[Step]:
    return [
        ({"case": f"graph equals eager, {name}, {batch} sequences"}, partial(compare, clock, name, batch))
        for name in ("tiny", "tiny-experts", "smollm2-135m")
        for batch in (1, 3, 16)
    ]


def compare(clock: Clock, name: str, batch: int) -> dict[str, Any]:
    """Largest difference between the logits of a replayed step and of the same step run eagerly: it must be exactly zero."""
    if not clock.is_gpu:
        raise NeedsDeviceError("a CPU has no graphs")
    device = clock.device
    blocks = batch * 128 * (2 if name == "tiny" else 1)
    runner = build_runner(SHAPES[name], select_ops("triton"), device=device, dtype=torch.bfloat16, num_blocks=blocks)
    runner.cache.pool.normal_()
    kept = runner.cache.pool.clone()
    runner.capture_graphs(batch)
    untouched = bool(torch.equal(runner.cache.pool, kept))
    graphs, worst = runner.graphs, 0.0
    for context in CONTEXTS:
        plan = step_of(runner, [(context - 1, [5 + s]) for s in range(batch)], 2048)
        runner.graphs = graphs
        replayed = runner.logits(runner.forward(plan)).clone()
        runner.cache.pool.copy_(kept)
        runner.graphs = None
        eager = runner.logits(runner.forward(plan))
        runner.cache.pool.copy_(kept)
        worst = max(worst, float((replayed - eager).abs().max()))
    return {"passes": untouched and worst == 0.0, "largest_difference": worst, "capture_left_kv_alone": untouched, "contexts": CONTEXTS}
