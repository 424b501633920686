"""Part of `bench.gpu`: single decode steps of whole models with random weights, lines G10 to G12, G18, G20 and G22, and of braid-nano.

Offline runs are in gpu_offline, arrivals and prefixes in gpu_serving.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from bench import host_step
from bench.gpu_clock import Clock, NeedsDeviceError
from bench.gpu_engine import Limits, Wanted, forget, serve
from bench.gpu_models import limit_of, runner_of, work_of
from bench.gpu_score import Line, Step, scored, steps_of
from bench.gpu_transformers import lines_of
from bench.models import step_of
from service.runner.runner import Runner
from service.scheduling.plan import StepPlan

CONTEXT = 1024


def step_s(clock: Clock, runner: Runner, plan: StepPlan) -> float:
    """From a plan to drawn ids, as the engine waits for them."""

    def work() -> None:
        runner.sample(runner.forward(plan))

    if clock.is_gpu:
        work()
    found = float(np.median([clock.wall_s(work) for _ in range(clock.sized(30, 1))]))
    forget(runner, [plan])
    return found


def busy_or_why(clock: Clock, runner: Runner, plan: StepPlan) -> float | str:
    """Seconds that the device computes in a step; where the profiler can't tell, its reason."""
    try:
        busy_s = clock.busy_s(lambda: runner.sample(runner.forward(plan)), 5)
        forget(runner, [plan])
        return busy_s
    except (NeedsDeviceError, RuntimeError) as error:
        return str(error)


def in_loop(clock: Clock, runner: Runner, count: int, prompt_len: int, num_drawn: int) -> tuple[float, list[StepPlan], str]:
    """Median seconds from one step's issue to the next one's in the engine's loop, of the steps in which all sequences decode; those steps;
    and the loop's name."""
    wanted = [Wanted((5 + at % 40,) * prompt_len, num_drawn) for at in range(count)]
    outcome = serve(runner, wanted, Limits(count, 8192, deadline_s=25))
    full = [at for at, plan in enumerate(outcome.plans) if len(plan.samples) == count and plan.num_tokens == count]
    gaps = [outcome.issued_s[at + 1] - outcome.issued_s[at] for at in full if at + 1 in full]
    if not gaps:
        raise RuntimeError(f"no two steps of {count} sequences in a row among {len(outcome.plans)}")
    return float(np.median(gaps)), [outcome.plans[at] for at in full], outcome.loop


def decode(
    clock: Clock, name: str, count: int, weights: str = "dense", prompt_len: int = CONTEXT, kernels_a_layer: int = 0
) -> dict[str, Any]:
    """In the engine's loop. alone_s: of a step whose ids the host waits for; busy_s: of it the device computes, by the profiler. The
    limit is of the weights as they are held, and of so many launches a layer."""
    count, prompt_len, num_drawn = clock.sized((count, prompt_len, 40), (min(count, 2), 3, 3))
    runner = runner_of(clock, name, count, prompt_len + num_drawn, weights=weights)
    mine, plans, loop = in_loop(clock, runner, count, prompt_len, num_drawn)
    plan = step_of(runner, [(prompt_len - 1, [7])] * count, prompt_len)
    alone_s, busy_s = step_s(clock, runner, plan), busy_or_why(clock, runner, plan)
    limit = limit_of(clock.rates, runner, plans) / len(plans) + kernels_a_layer * len(runner.model.config.layers) * clock.rates.kernel_s
    figures: dict[str, Any] = {
        "tokens_per_s": count / mine,
        "bytes_per_s": work_of(runner, plan)[0] / mine,
        "alone_s": alone_s,
        "busy_s": busy_s,
    }
    return scored(limit, mine, loop=loop, ops=runner.model.ops.name, **figures)


def nano(clock: Clock) -> dict[str, Any]:
    """The shipped model, loaded as `braid serve` loads it: real weights, graphs and all."""
    from bench.lane import load_lane

    loaded, _ = load_lane("braid-nano", max_sequences=clock.sized(16, 2))
    runner = loaded.runner
    if not isinstance(runner, Runner):
        raise TypeError("braid-nano is no decoder")
    plan = step_of(runner, [(199, [7])], 208)
    mine = step_s(clock, runner, plan)
    return scored(limit_of(clock.rates, runner, [plan]), mine, tokens_per_s=1 / mine, ops=runner.model.ops.name)


def host_share(clock: Clock, name: str, count: int) -> dict[str, Any]:
    """Between two steps of the engine's loop, what the device does not fill. score: 1 is nothing."""
    count, prompt_len, num_drawn = clock.sized((count, 256, 40), (2, 3, 3))
    runner = runner_of(clock, name, count, prompt_len + num_drawn)
    between_s, _, loop = in_loop(clock, runner, count, prompt_len, num_drawn)
    if not clock.is_gpu:
        raise NeedsDeviceError("a CPU is its own host: nothing runs beside it")
    plan = step_of(runner, [(prompt_len, [7])] * count, prompt_len + 1)
    busy_s = clock.busy_s(lambda: runner.sample(runner.forward(plan)), 5)
    forget(runner, [plan])
    return scored(busy_s, between_s, visible_s=between_s - busy_s, visible_share=1 - busy_s / between_s, loop=loop)


def host_inputs(clock: Clock) -> dict[str, Any]:
    """Milliseconds of the host for the inputs of a step of 256, out of a state on the device and built anew; no model."""
    batch, context, count = clock.sized((256, 2048, 100), (4, 32, 4))
    return host_step.measure(clock.device, batch=batch, context=context, count=count)


def invariant(clock: Clock, name: str, count: int) -> dict[str, Any]:
    """A step with --deterministic beside one without: limit_s is the latter."""
    count, context = clock.sized((count, CONTEXT), (min(count, 2), 17))
    times = []
    for is_deterministic in (False, True):
        runner = runner_of(clock, name, count, context, is_deterministic=is_deterministic)
        times.append(step_s(clock, runner, step_of(runner, [(context - 1, [7])] * count, context)))
    return scored(times[0], times[1], slowdown=times[1] / times[0])


def pictures(clock: Clock, name: str) -> dict[str, Any]:
    """576 steps of the middle ones: 8 pictures with guidance are 16 rows. The limit has 8 launches a layer."""
    found = decode(clock, name, 16, prompt_len=268, kernels_a_layer=8)
    whole = {key: 576 * found[key] for key in ("limit_s", "measured_s")}
    return found | whole | {"note": "guidance's mixing of logits is not in it"}


LINES = (
    Line(
        "G10",
        "a decode step, Llama-8B, bf16, one sequence of 1,024",
        "(weights + keys and values) / read bandwidth",
        0.75,
        0.92,
        {"llama-8b, 1 sequence": partial(decode, name="llama-8b", count=1), "llama-8b, 64": partial(decode, name="llama-8b", count=64)}
        | {f"llama-8b, {kind}, 1 sequence": partial(decode, name="llama-8b", count=1, weights=kind) for kind in ("int4", "fp8")},
        cap_s=45,
    ),
    Line(
        "G11",
        "a decode step, Llama-1B and Gemma-3-1B, one sequence of 1,024",
        "(weights + keys and values) / read bandwidth",
        0.50,
        0.80,
        {f"{name}, 1 sequence": partial(decode, name=name, count=1) for name in ("llama-1b", "gemma3-1b")},
    ),
    Line(
        "G12",
        "a decode step, SmolLM2-135M and Gemma-3-270M, one sequence of 1,024",
        "(weights + keys and values) / read bandwidth + a launch for each layer",
        0.30,
        0.65,
        {f"{name}, 1 sequence": partial(decode, name=name, count=1, kernels_a_layer=1) for name in ("smollm2-135m", "gemma3-270m")}
        | {"braid-nano": nano},
    ),
    Line(
        "G18",
        "between two steps of the engine's loop, Qwen3-0.6B, 256 sequences",
        "what the device computes",
        0.75,
        0.99,
        {"qwen3-0.6b, 256": partial(host_share, name="qwen3-0.6b", count=256), "inputs, 256": host_inputs},
    ),
    Line(
        "G20",
        "a decode step with batch-invariant products",
        "the same step without",
        1 / 1.6,
        1 / 1.1,
        {f"llama-1b, {count}": partial(invariant, name="llama-1b", count=count) for count in (1, 64)},
    ),
    Line(
        "G22",
        "8 pictures of 576 codes with guidance, LlamaGen's shapes",
        "576 x ((weights + keys and values) / read bandwidth + 8 launches for each layer)",
        0.20,
        0.60,
        {name: partial(pictures, name=name) for name in ("llamagen-111m", "llamagen-1.4b")},
    ),
)
THEIRS = {"G10": ("llama-8b", 1, CONTEXT, 32), "G11": ("llama-1b", 1, CONTEXT, 32), "G12": ("smollm2-135m", 1, CONTEXT, 32)}


def steps(clock: Clock) -> list[Step]:
    return steps_of(clock, LINES) + steps_of(clock, lines_of(THEIRS, LINES))
