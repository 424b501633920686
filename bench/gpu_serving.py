"""Part of `bench.gpu`: requests that arrive, shared prefixes, guesses and what a mixed load compiles, lines G17, G19, G21 and G23.

Through the engine's loop in this process, without HTTP. `python -m bench.gpu_serving cuda` is a start in a process of its own: it builds a
small model, captures its steps, makes one and ends.
"""

from __future__ import annotations

import math
import random
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

from bench.gpu_clock import Clock, NotBuiltError, clock_of
from bench.gpu_engine import Limits, Wanted, serve
from bench.gpu_models import runner_of
from bench.gpu_score import Line, Step, found, scored, steps_of
from bench.models import step_of
from service.runner.runner import Runner

TTFT_S, TPOT_S = 0.5, 0.02
PROMPT, ANSWER = 220, 180  # means, about those of the ShareGPT talks that servers are measured with


def arrivals(clock: Clock, runner: Runner, rate: float, during_s: float) -> list[Wanted]:
    """A Poisson process; lengths are exponential around their means, within 16 and four times the mean."""
    source = random.Random(1)
    prompt, answer = clock.sized((PROMPT, ANSWER), (8, 3))
    last = runner.model.config.vocab_size - 1
    wanted: list[Wanted] = []
    at_s = 0.0
    while (at_s := at_s + source.expovariate(rate)) < during_s or not wanted:
        lengths = [round(min(max(source.expovariate(1 / mean), mean / 10), 4 * mean)) for mean in (prompt, answer)]
        wanted.append(Wanted(tuple(source.randint(2, last) for _ in range(max(lengths[0], 1))), max(lengths[1], 2), at_s))
    return wanted


def goodput(clock: Clock, name: str, rate: float) -> dict[str, Any]:
    """Seconds for each request that kept both promises, beside what one costs at the limit when as many run as TPOT allows."""
    at_once, tokens = clock.sized((256, 600), (3, 64))  # on average: all share one pool
    runner = runner_of(clock, name, at_once, tokens)
    limits = Limits(at_once, 4096, max_prefill_s=clock.sized(0.02, 0.0), deadline_s=12)
    wanted = arrivals(clock, runner, rate, during_s=clock.sized(6.0, 0.0))
    outcome = serve(runner, wanted, limits)
    kept = 0
    for one, first_s, last_s, ids in zip(wanted, outcome.first_s, outcome.last_s, outcome.ids, strict=True):
        tpot_s = (last_s - first_s) / max(len(ids) - 1, 1) if math.isfinite(last_s) else math.inf
        kept += first_s - one.arrives_s <= clock.sized(TTFT_S, math.inf) and tpot_s <= clock.sized(TPOT_S, 1e9)
    figures: dict[str, Any] = {"rate": rate, "requests": len(wanted), "kept": kept, "goodput": kept / outcome.wall_s}
    figures |= {"layers_busy": outcome.busy_s / outcome.wall_s, "loop": outcome.loop}
    if not kept:
        return {"limit_s": request_limit_s(clock, runner), "score": 0.0} | figures
    return scored(request_limit_s(clock, runner), outcome.wall_s / kept, **figures)


def request_limit_s(clock: Clock, runner: Runner) -> float:
    config, rates = runner.model.config, clock.rates
    weights = runner.model.read_bytes
    kv = 2 * len(config.layers) * config.num_kv_heads * config.head_width * clock.dtype.itemsize * (PROMPT + ANSWER / 2)
    fit = max((TPOT_S * rates.read - weights) / kv, 1.0)
    return 2 * config.num_parameters * PROMPT / rates.bf16 + ANSWER * (weights / fit + kv) / rates.read


def ttft_s(runner: Runner, prompts: list[tuple[int, ...]], has_cache: bool) -> float:
    """Median time to the first id of all but the first prompt, one after the other; all in one run, so that they share a cache."""
    gap_s = 1.0 if runner.device.type == "cuda" else 0.0
    wanted = [Wanted(prompt, 1, arrives_s=at * gap_s) for at, prompt in enumerate(prompts)]
    outcome = serve(runner, wanted, Limits(1, 8192, has_prefix_cache=has_cache, deadline_s=40))
    if gap_s:
        waited = [first - one.arrives_s for first, one in zip(outcome.first_s, wanted, strict=True)]
    else:  # one after the other as fast as they come
        waited = [first - before for first, before in zip(outcome.first_s, [0.0, *outcome.last_s], strict=False)]
    return statistics.median(waited[1:])


def prefix(clock: Clock, name: str, shared: float) -> dict[str, Any]:
    """shared: which part of each prompt all have in common. The limit is the uncached time, of what is not shared."""
    length = clock.sized(4096, 20)
    runner = runner_of(clock, name, 6, length + 32)
    source, last = random.Random(2), runner.model.config.vocab_size - 1
    head = tuple(source.randint(2, last) for _ in range(int(length * shared)))

    def prompts() -> list[tuple[int, ...]]:
        return [head + tuple(source.randint(2, last) for _ in range(length - len(head))) for _ in range(clock.sized(4, 2))]

    if clock.is_gpu:
        ttft_s(runner, prompts()[:2], has_cache=False)  # compiles
    without_s, with_s = (ttft_s(runner, prompts(), has_cache=has_cache) for has_cache in (False, True))
    return scored((1 - shared) * without_s, with_s, speed_up=without_s / with_s, overhead=with_s / without_s - 1)


def guesses(clock: Clock, name: str, count: int) -> dict[str, Any]:
    """With prompt lookup and without; the prompts repeat themselves. limit_s: the time without, so a score above 1 is a gain. bfloat16 sums
    depend on how many rows there are, so ids can part; equal_ids is the share that is equal from the beginning on."""
    count, length, num_drawn = clock.sized((count, 128, 64), (min(count, 2), 8, 3))
    runner = runner_of(clock, name, count, length + num_drawn + 16)
    last = min(runner.model.config.vocab_size, 1000) - 1
    times, ids, steps = [], [], []
    for draft_len in (0, 8):
        wanted = []
        for number in range(count):
            source = random.Random(number)
            phrase = [source.randint(2, last) for _ in range(length // 4)]
            wanted.append(Wanted(tuple(phrase * 4), num_drawn, draft_len=draft_len))
        if clock.is_gpu:
            serve(runner, wanted, Limits(count, 8192))  # compiles
        outcome = serve(runner, wanted, Limits(count, 8192, deadline_s=15))
        times.append(outcome.wall_s)
        ids.append([each for answer in outcome.ids for each in answer])
        steps.append(len(outcome.plans))
    same = next((at for at, pair in enumerate(zip(*ids, strict=False)) if pair[0] != pair[1]), len(ids[0])) / max(len(ids[0]), 1)
    return scored(times[0], times[1], speed_up=times[0] / times[1], steps=steps, equal_ids=same)


def mixed_load(clock: Clock, name: str) -> dict[str, Any]:
    """After what `braid serve` does before it is ready (until that is built, a first load): kernels that a load compiles or loads anew, and
    decode steps for which there was no graph. Both should be 0, and the score is then 1."""
    import triton

    at_once = clock.sized(64, 3)
    runner = runner_of(clock, name, at_once, clock.sized(4 * (PROMPT + ANSWER), 64))
    limits = Limits(at_once, 2048, max_prefill_s=clock.sized(0.02, 0.0), deadline_s=10)
    compiled: list[str] = []
    graphs = runner.graphs

    def note(**about: Any) -> bool:
        compiled.append(str(about.get("repr", "a kernel"))[:80])
        return False

    how = make_ready(clock, runner, limits)
    misses = getattr(graphs, "num_misses", None)
    before, triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_cache_hook, note
    try:
        outcome = serve(runner, arrivals(clock, runner, clock.sized(60.0, 5.0), clock.sized(4.0, 0.0)), limits)
    finally:
        triton.knobs.runtime.jit_cache_hook = before
    decodes = sum(all(len(piece.tokens) == 1 for piece in plan.slices) for plan in outcome.plans)
    missed = None if misses is None else getattr(graphs, "num_misses", 0) - misses
    figures = {"recompiles": len(compiled), "kernels": compiled[:5], "graph_misses": missed, "decode_steps": decodes}
    return {"score": float(not compiled and not missed), "warm_up": how} | figures


def make_ready(clock: Clock, runner: Runner, limits: Limits) -> str:
    """What came before, in words."""
    try:
        warm_up, shape = found("service.runner.warmup", "warm_up"), found("service.runner.warmup", "Limits")
    except NotBuiltError:
        serve(runner, arrivals(clock, runner, clock.sized(40.0, 5.0), clock.sized(4.0, 0.0)), limits)
        return "a first load"
    config = runner.model.config
    warm_up(
        runner,
        shape(
            num_groups=runner.num_groups,
            block_size=runner.cache.block_size,
            max_batch_tokens=clock.sized(limits.max_batch_tokens, 2),
            max_sequences=clock.sized(limits.max_sequences, 1),
            max_context=config.max_context,
            vocab_size=config.vocab_size,
        ),
    )
    return "as braid serve does"


def warm_start(clock: Clock) -> dict[str, Any]:
    """A process from nothing to its first id, kernels from the disk cache that the first such process filled."""
    command = [sys.executable, "-m", "bench.gpu_serving", clock.device.type]
    seconds = []
    for _ in range(clock.sized(2, 1)):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        seconds.append(time.perf_counter() - start)
        if done.returncode:
            raise RuntimeError(done.stderr[-400:])
    return {"cold_s": seconds[0], "measured_s": seconds[-1], "limit_s": 10.0, "score": min(1.0, 10 / seconds[-1]), "baselines": {}}


LINES = (
    Line(
        "G17",
        "Llama-8B, Poisson arrivals of about 220 + 180 ids, first id within 500 ms and 20 ms between ids",
        "prompt operations / bf16 rate + ids x (weights / sequences that 20 ms allow + keys and values) / read bandwidth",
        0.40,
        0.75,
        {f"llama-8b, {rate} a second": partial(goodput, name="llama-8b", rate=rate) for rate in (24, 12, 48)},
        cap_s=40,
    ),
    Line(
        "G19",
        "first id, Llama-1B, prompts of 4,096, one after the other, prefix cache on and off",
        "(1 - shared part) x the time without the cache",
        0.60,
        0.90,
        {f"llama-1b, {shared:.0%} shared": partial(prefix, name="llama-1b", shared=shared) for shared in (0.9, 0.0)},
    ),
    Line(
        "G21",
        "prompt lookup on Llama-1B, prompts that repeat themselves",
        "the time without guesses",
        1.0,
        2.3,
        {f"llama-1b, {count}": partial(guesses, name="llama-1b", count=count) for count in (1, 64)},
    ),
    Line(
        "G23",
        "kernels compiled and graphs missed in a mixed load, Llama-1B; a start with kernels on disk, SmolLM2-135M",
        "none; 10 s",
        1.0,
        1.0,
        {"llama-1b, mixed load": partial(mixed_load, name="llama-1b"), "start": warm_start},
    ),
)


def steps(clock: Clock) -> list[Step]:
    return steps_of(clock, LINES)


if __name__ == "__main__":
    here = clock_of(sys.argv[1], is_tiny=sys.argv[1] == "cpu")
    small = runner_of(here, "smollm2-135m", here.sized(16, 2), 64)
    small.sample(small.forward(step_of(small, [(0, [5, 6, 7])], 64)))
