"""Requests through Braid's own engine loop in this process, for `bench.gpu`: arrivals by the clock, no HTTP and no second process.

A stand-in for the mailbox hands requests in and notes when ids come out. Where the engine's messages cannot be imported (they need msgspec)
scheduler and runner are stepped directly, and the figures say so. Called by gpu_offline, gpu_serving and gpu_steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench.gpu_models import BLOCK_SIZE
from service.runner.kv_cache import partition_layers
from service.runner.runner import Runner
from service.scheduling.plan import StepPlan
from service.scheduling.sampling import SamplingParams
from service.scheduling.scheduler import Scheduler
from service.scheduling.sequence import Request


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request: ids of its prompt, ids drawn, when it arrives."""

    prompt: tuple[int, ...]
    num_drawn: int
    arrives_s: float = 0.0
    temperature: float = 0.0
    draft_len: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """Of `braid serve`'s flags. deadline_s: after so long the run ends where it is."""

    max_sequences: int
    max_batch_tokens: int = 2048
    has_prefix_cache: bool = False
    max_prefill_s: float = 0.0
    deadline_s: float = 60.0


@dataclass(slots=True)
class Outcome:
    """By request: ids drawn, when the first and the last came (seconds after the start). plans: of all steps, and when each was issued.
    busy_s: that the device was between the beginning and the end of a step's layers, draws not counted; 0 on a CPU."""

    loop: str
    ids: list[list[int]]
    first_s: list[float]
    last_s: list[float]
    plans: list[StepPlan] = field(default_factory=list)
    issued_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    wall_s: float = 0.0
    busy_s: float = 0.0

    @property
    def num_drawn(self) -> int:
        return sum(map(len, self.ids))


class _Watched:
    """The runner, and a list of what it was told to compute."""

    def __init__(self, runner: Runner, outcome: Outcome, start: float) -> None:
        self._runner, self._outcome, self._start = runner, outcome, start
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, plan: StepPlan, *rest: Any, **options: Any) -> Any:
        self._outcome.plans.append(plan)
        self._outcome.issued_s.append(time.perf_counter() - self._start)
        if self._runner.device.type != "cuda":
            return self._runner.forward(plan, *rest, **options)
        span = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        span[0].record()
        handle = self._runner.forward(plan, *rest, **options)
        span[1].record()
        self._spans.append(span)
        return handle

    def busy_s(self) -> float:
        if self._spans:
            torch.cuda.synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in self._spans)) / 1e3


def serve(runner: Runner, wanted: Sequence[Wanted], limits: Limits) -> Outcome:
    """Until every answer has its length, or the deadline. Raises: RuntimeError where the engine failed a request."""
    count = len(wanted)
    outcome = Outcome("engine", [[] for _ in range(count)], [float("inf")] * count, [float("inf")] * count)
    start = time.perf_counter()
    watched = _Watched(runner, outcome, start)
    if runner.device.type == "cpu":  # the interpreter is as slow as the machine is busy
        limits = replace(limits, deadline_s=float("inf"))
    try:
        import msgspec  # noqa: F401
    except ImportError:
        outcome.loop = "scheduler and runner alone: msgspec is missing"
        _step_all(watched, wanted, limits, outcome, start)
    else:
        _run_engine(watched, wanted, limits, outcome, start)
    outcome.wall_s = time.perf_counter() - start
    outcome.busy_s = watched.busy_s()
    forget(runner, outcome.plans)
    if outcome.errors:
        raise RuntimeError(f"{len(outcome.errors)} requests failed, the first with: {outcome.errors[0]}")
    return outcome


def forget(runner: Runner, plans: Sequence[StepPlan]) -> None:
    """What the runner keeps of these plans' sequences, whose numbers the next run uses again."""
    runner.forward(StepPlan(-1, (), (), released=tuple({piece.sequence_id for plan in plans for piece in plan.slices})))


def _params(number: int, one: Wanted) -> SamplingParams:
    return SamplingParams(one.num_drawn, temperature=one.temperature, seed=number)


def _run_engine(watched: _Watched, wanted: Sequence[Wanted], limits: Limits, outcome: Outcome, start: float) -> None:
    from service.engine.engine import Engine
    from service.engine.messages import Load, ModelInfo
    from service.runner.load import Loaded
    from service.worker import build_lane

    config, cache = watched.model.config, watched.cache
    num_blocks = cache.pool.shape[2]
    info = ModelInfo("bench", config.max_context, config.vocab_size, "bench", 0, num_blocks * BLOCK_SIZE, num_blocks, cache.block_size)
    load = Load(
        models=(),
        dtype="auto",
        device="auto",
        memory_bytes=0,
        max_context=0,
        max_batch_tokens=limits.max_batch_tokens,
        max_sequences=limits.max_sequences,
        prefix_cache=limits.has_prefix_cache,
        max_prefill_s=limits.max_prefill_s,
    )
    lane = build_lane(Loaded(info, watched, partition_layers(config).groups), load)  # type: ignore[arg-type]
    Engine([lane], _Feed(wanted, limits, outcome, start), time.monotonic).run()  # type: ignore[arg-type]


class _Feed:
    """Stands for the mailbox: gives requests out when they are due, then `Shutdown`, and notes what is delivered."""

    is_closed = False

    def __init__(self, wanted: Sequence[Wanted], limits: Limits, outcome: Outcome, start: float) -> None:
        self.wanted, self.limits, self.outcome, self.start = wanted, limits, outcome, start
        self.order = sorted(range(len(wanted)), key=lambda number: wanted[number].arrives_s)
        self.num_given = self.num_ended = 0

    def receive(self, timeout_s: float | None) -> list[Any]:
        from service.engine.messages import Generate, Shutdown

        now = time.perf_counter() - self.start
        if self.num_ended == len(self.wanted) or now > self.limits.deadline_s:
            return [Shutdown()]
        due = []
        while self.num_given < len(self.order) and self.wanted[self.order[self.num_given]].arrives_s <= now:
            number = self.order[self.num_given]
            one = self.wanted[number]
            due.append(Generate(str(number), "bench", list(one.prompt), _params(number, one), draft_len=one.draft_len))
            self.num_given += 1
        if not due and timeout_s != 0 and self.num_given < len(self.order):
            wait_s = self.wanted[self.order[self.num_given]].arrives_s - now
            time.sleep(max(0.0, wait_s if timeout_s is None else min(wait_s, timeout_s)))
        return due

    def send(self, message: Any, *_: Any, **__: Any) -> bool:
        now = time.perf_counter() - self.start
        for event in getattr(message, "events", ()):
            number = int(event.request_id)
            if event.tokens:
                self.outcome.ids[number].extend(event.tokens)
                self.outcome.first_s[number] = min(self.outcome.first_s[number], now)
            if event.finish is not None:
                self.outcome.last_s[number] = now
                self.num_ended += 1
            if event.error:
                self.outcome.errors.append(event.error)
        return True

    def wait_for_room(self, timeout_s: float) -> bool:
        return True

    def wake(self) -> None:
        pass


def _step_all(watched: _Watched, wanted: Sequence[Wanted], limits: Limits, outcome: Outcome, start: float) -> None:
    config, cache = watched.model.config, watched.cache
    scheduler = Scheduler(
        num_blocks=cache.pool.shape[2],
        block_size=cache.block_size,
        groups=partition_layers(config).groups,
        max_batch_tokens=limits.max_batch_tokens,
        max_sequences=limits.max_sequences,
        max_context=config.max_context,
        has_prefix_cache=limits.has_prefix_cache,
        max_waiting_tokens=2**62,
    )
    waiting = sorted(range(len(wanted)), key=lambda number: wanted[number].arrives_s)
    while (waiting or scheduler.has_work) and (now := time.perf_counter() - start) < limits.deadline_s:
        while waiting and wanted[waiting[0]].arrives_s <= now:
            number = waiting.pop(0)
            one = wanted[number]
            scheduler.add(Request(str(number), (one.prompt,), _params(number, one), draft_len=one.draft_len), 0.0)
        plan, _ = scheduler.plan(0.0)
        if plan is None:
            continue
        drawn = watched.sample(watched.forward(plan))
        now = time.perf_counter() - start
        for output in scheduler.commit(plan, drawn, 0.0):
            number = int(output.request_id)
            if output.token is not None:
                outcome.ids[number].append(output.token)
                outcome.first_s[number] = min(outcome.first_s[number], now)
            if len(outcome.ids[number]) == wanted[number].num_drawn:
                outcome.last_s[number] = now
