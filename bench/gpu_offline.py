"""Part of `bench.gpu`: many requests that are all there at once, through the engine's loop, lines G13 to G16.

Answers and prompts are cut to what minutes allow, which the workload says: the limit is the sum of what the steps that ran must move and
multiply, so the score is that of these steps.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from bench.gpu_clock import Clock
from bench.gpu_engine import Limits, Outcome, Wanted, serve
from bench.gpu_models import limit_of, runner_of
from bench.gpu_score import Line, Step, scored, steps_of
from bench.gpu_transformers import lines_of
from bench.offline import TEMPERATURE, requests_of
from service.runner.runner import Runner

MOST_SEQUENCES = 256


def answers(clock: Clock, name: str, count: int, prompt_len: int, num_drawn: int, deadline_s: float = 15.0) -> dict[str, Any]:
    """Of equal lengths, greedy."""
    count, prompt_len, num_drawn = clock.sized((count, prompt_len, num_drawn), (min(count // 128, 3), 5, 3))
    at_once = min(count, MOST_SEQUENCES)
    runner = runner_of(clock, name, at_once, prompt_len + num_drawn)
    source = random.Random(0)
    last = runner.model.config.vocab_size - 1
    wanted = [Wanted(tuple(source.randint(2, last) for _ in range(prompt_len)), num_drawn) for _ in range(count)]
    return per_token(clock, runner, serve(runner, wanted, Limits(at_once, 8192, deadline_s=deadline_s)))


def per_token(clock: Clock, runner: Runner, outcome: Outcome) -> dict[str, Any]:
    """Seconds for each id drawn, of all together."""
    drawn = outcome.num_drawn
    limit_s = limit_of(clock.rates, runner, outcome.plans)
    return scored(
        limit_s / drawn,
        outcome.wall_s / drawn,
        tokens=drawn,
        tokens_per_s=drawn / outcome.wall_s,
        wall_s=outcome.wall_s,
        steps=len(outcome.plans),
        layers_busy=outcome.busy_s / outcome.wall_s,
        is_cut=any(last == float("inf") for last in outcome.last_s),
        loop=outcome.loop,
        ops=runner.model.ops.name,
    )


def prompts(clock: Clock, name: str, count: int, length: int, weights: str = "dense") -> dict[str, Any]:
    """Seconds for each id of the prompts."""
    count, length = clock.sized((count, length), (2, 20))
    runner = runner_of(clock, name, count, length + 16, weights=weights)
    source = random.Random(0)
    last = runner.model.config.vocab_size - 1
    wanted = [Wanted(tuple(source.randint(2, last) for _ in range(length)), 1) for _ in range(count)]
    if clock.is_gpu:
        serve(runner, wanted[:1], Limits(count, 8192))  # compiles
    outcome = serve(runner, wanted, Limits(count, 8192, deadline_s=15))
    num_read = sum(piece.start + len(piece.tokens) == length for plan in outcome.plans for piece in plan.slices) * length
    limit_s = limit_of(clock.rates, runner, outcome.plans)
    return scored(limit_s / num_read, outcome.wall_s / num_read, tokens_per_s=num_read / outcome.wall_s, loop=outcome.loop)


def nano_vllm(clock: Clock) -> dict[str, Any]:
    """The requests of nano-vllm's bench.py, as in `bench.offline`."""
    count, least, most, at_once = clock.sized((256, 100, 1024, MOST_SEQUENCES), (3, 3, 8, 3))
    runner = runner_of(clock, "qwen3-0.6b", at_once, clock.sized(1200, 2 * most))  # on average: all share one pool
    asked = requests_of(count, least, most, runner.model.config.vocab_size, seed=0)
    wanted = [Wanted(one.prompt, one.num_drawn, temperature=TEMPERATURE) for one in asked]
    return per_token(clock, runner, serve(runner, wanted, Limits(at_once, 8192, deadline_s=25)))


_STEPS_LIMIT = "sum over steps of the larger of (weights + keys and values) / read bandwidth and operations / bf16 rate"
LINES = (
    Line(
        "G13",
        "Llama-8B, 128 prompts of 32, the first 256 of 2,048 ids of each answer",
        _STEPS_LIMIT,
        0.56,
        0.85,
        {"llama-8b, 128 x 256": partial(answers, name="llama-8b", count=128, prompt_len=32, num_drawn=256)},
    ),
    Line(
        "G14",
        "Gemma-3-1B, 256 and 1,024 prompts of 32, answers of 256",
        _STEPS_LIMIT,
        0.15,
        0.60,
        {
            f"gemma3-1b, {count} x 256": partial(answers, name="gemma3-1b", count=count, prompt_len=32, num_drawn=256)
            for count in (256, 1024)
        },
    ),
    Line(
        "G15",
        "Llama-8B, prompts of 4,096, 8 of the 32",
        _STEPS_LIMIT,
        0.59,
        0.80,
        {
            f"llama-8b, 8 x 4096, {weights}": partial(prompts, name="llama-8b", count=8, length=4096, weights=weights)
            for weights in ("dense", "fp8")
        },
    ),
    Line("G16", "nano-vllm's 256 requests on Qwen3-0.6B's shape", _STEPS_LIMIT, 0.25, 0.55, {"qwen3-0.6b, 256 requests": nano_vllm}),
)
THEIRS = {"G14": ("gemma3-1b", 256, 32, 32), "G13": ("llama-8b", 128, 32, 32), "G16": ("qwen3-0.6b", 128, 512, 32)}


def steps(clock: Clock) -> list[Step]:
    return steps_of(clock, LINES) + steps_of(clock, lines_of(THEIRS, LINES))
