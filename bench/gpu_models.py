"""Models of known shapes for `bench.gpu`: runners with random weights, one held at a time, and what a step must move and multiply.

No timing and no workload here. Called by the parts that step whole models.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable
from typing import Any

from bench.gpu_clock import Clock, Rates
from bench.gpu_score import found
from bench.models import SHAPES, build_runner
from kernels.ops import select_ops
from service.model.config import ModelConfig
from service.model.transformer import Precision
from service.runner.kv_cache import partition_layers
from service.runner.runner import Runner
from service.scheduling.plan import StepPlan

BLOCK_SIZE = 16
BUILT_BY = {"int4": "kernels.linear.grouped_triton", "fp8": "kernels.linear.fp8_triton"}
"""The module that brings a kind of product to the GPU; without it the reference would be timed."""
_held: dict[tuple[Any, ...], Runner] = {}


def name_of(clock: Clock, name: str) -> str:
    return clock.sized(name, "tiny-gemma" if name.startswith("gemma") else "tiny-dense")


def config_of(clock: Clock, name: str) -> ModelConfig:
    return SHAPES[name_of(clock, name)]


def runner_of(clock: Clock, name: str, sequences: int, tokens: int, *, weights: str = "dense", is_deterministic: bool = False) -> Runner:
    """sequences: at once, of so many tokens each. weights: as a `Precision` names them. With its decode steps captured where there is a
    device. Building another gives the memory of the last one back. Raises: NotBuiltError."""
    key = (name_of(clock, name), sequences, tokens, weights, is_deterministic)
    if key not in _held:
        drop(clock)
        config = config_of(clock, name)
        num_blocks = sequences * len(partition_layers(config).groups) * (-(-tokens // BLOCK_SIZE) + 1)
        precision = Precision(clock.dtype, weights_of(weights))
        ops = select_ops("triton", deterministic=is_deterministic)
        runner = build_runner(config, ops, device=clock.device, dtype=precision, num_blocks=num_blocks, block_size=BLOCK_SIZE)
        if clock.is_gpu:
            runner.capture_graphs(sequences)
        _held[key] = runner
    return _held[key]


def weights_of(kind: str) -> Any:
    """Raises: NotBuiltError where the GPU has no product by such weights."""
    if kind in BUILT_BY:
        found(BUILT_BY[kind], "__name__")
    return kind


def drop(clock: Clock) -> None:
    _held.clear()
    gc.collect()  # a runner and its graphs hold one another
    clock.free()


def work_of(runner: Runner, plan: StepPlan) -> tuple[float, float]:
    """(bytes, operations) of a step: weights once, every key and value that some query sees, products of all tokens and of the rows
    that are drawn from. Activations are not counted."""
    config, itemsize = runner.model.config, runner.cache.pool.element_size()
    windows = Counter(layer.window for layer in config.layers)
    tokens = sum(len(piece.tokens) for piece in plan.slices)
    keys = pairs = 0
    for piece in plan.slices:
        count, start = len(piece.tokens), piece.start
        for window, layers in windows.items():
            seen = start + count if window is None else min(start + count, window + count - 1)
            keys += layers * seen
            pairs += layers * _pairs(start, count, window)
    table = config.vocab_size * config.width
    in_layers = config.num_parameters - (1 if config.has_tied_head else 2) * table
    num_bytes = runner.model.read_bytes + 2.0 * keys * config.num_kv_heads * config.head_width * itemsize
    flops = 2.0 * in_layers * tokens + 2.0 * table * len(plan.samples) + 4.0 * pairs * config.num_heads * config.head_width
    return num_bytes, flops


def _pairs(start: int, count: int, window: int | None) -> int:
    """Queries and the keys they see, of `count` tokens from position `start` on."""
    if window is None or start + count <= window:
        return count * start + count * (count + 1) // 2
    grows = max(0, min(count, window - start))
    return grows * start + grows * (grows + 1) // 2 + (count - grows) * window


def limit_of(rates: Rates, runner: Runner, plans: Iterable[StepPlan]) -> float:
    """Seconds that these steps take at least."""
    return sum(rates.seconds(num_bytes=num_bytes, flops=flops) for num_bytes, flops in (work_of(runner, plan) for plan in plans))
