"""The loop of the engine process: drain the mailbox, plan, run, commit, deliver; and the wall that keeps a fault of one request
from being anybody else's.

It owns no device and no socket: lanes (scheduler + runner) and the mailbox are given to it by `service/worker.py`. No text, no HTTP.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from service.engine.mailbox import Mailbox
from service.engine.messages import (
    MAX_CHOICES,
    Abort,
    Delivery,
    Event,
    Generate,
    LaneStats,
    ModelInfo,
    Shutdown,
    TokenLogprob,
    Unreadable,
    Usage,
)
from service.engine.pace import Pulse, StepEstimate
from service.errors import BraidError, EngineError, ModelNotFoundError, RequestError
from service.scheduling.plan import Drawn, StepPlan
from service.scheduling.scheduler import Scheduler
from service.scheduling.sequence import Finish, Output, Request

log = logging.getLogger("braid.engine")

# After so many failed steps without a good one between, the device or the weights are broken and a fresh process is the cure.
MAX_FAILURES = 10
# How long nobody must have asked for anything before the books are checked: the check walks all blocks.
CALM_S = 1.0
# When sequences wait but none can be planned: only a message, or a deadline, can change that.
BLOCKED_WAIT_S = 0.02
STEP_FAILED = "the engine failed while it computed this request"


class Runner(Protocol):
    """What a lane needs from whoever owns the device."""

    def forward(self, plan: StepPlan) -> Any: ...

    def sample(self, handle: Any, masks: Any = None) -> list[Drawn]: ...


class BrokenEngineError(EngineError):
    """Steps keep failing; only a fresh process can help."""


@dataclass(eq=False, slots=True)
class Lane:
    """One model: what it is, who decides, who computes, and how long its steps take."""

    info: ModelInfo
    scheduler: Scheduler
    runner: Runner
    estimate: StepEstimate = field(default_factory=StepEstimate)

    def stats(self) -> LaneStats:
        stats = self.scheduler.stats
        return LaneStats(
            model=self.info.name,
            running=stats.running,
            waiting=stats.waiting,
            kv_blocks_used=stats.kv_blocks_used,
            kv_blocks_cached=stats.kv_blocks_cached,
            kv_blocks_total=stats.kv_blocks_total,
            preemptions=stats.preemptions,
            prompt_tokens=stats.prompt_tokens,
            generation_tokens=stats.generation_tokens,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
            steps=stats.steps,
        )


class Engine:
    """Steps its lanes in turn and sends one delivery per step. clock: seconds, monotonic."""

    def __init__(self, lanes: Sequence[Lane], mailbox: Mailbox, clock: Callable[[], float]) -> None:
        self.pulse = Pulse(clock)
        self.num_failed_checks = 0
        self._lanes = {lane.info.name: lane for lane in lanes}
        self._mailbox = mailbox
        self._clock = clock
        self._events: list[Event] = []
        self._num_failures = 0
        self._is_stopping = False
        self._is_unchecked = False

    def run(self) -> None:
        """Until `Shutdown` or the end of the peer. Raises: BrokenEngineError."""
        while not self._is_stopping and not self._mailbox.is_closed:
            if not self._mailbox.wait_for_room(1.0):
                continue
            has_stepped = False
            for lane in self._lanes.values():
                self._drain(0)
                has_stepped |= self._step(lane)
            if not has_stepped:
                self._rest()

    def _rest(self) -> None:
        """Nothing could be computed: wait for a message, and use a calm moment to check the books."""
        if any(lane.scheduler.has_work for lane in self._lanes.values()):
            self._drain(BLOCKED_WAIT_S)
        elif not self._is_unchecked:
            self._drain(None)
        elif not self._drain(CALM_S):
            self._check()

    def _check(self) -> None:
        self._is_unchecked = False
        for lane in self._lanes.values():
            try:
                lane.scheduler.check()
            except Exception:
                self.num_failed_checks += 1
                log.exception("the block tables of %s do not add up (time %d); please report this", lane.info.name, self.num_failed_checks)

    def _drain(self, timeout_s: float | None) -> bool:
        """Takes in what has arrived; True when something had. Ends that come of it go out at once."""
        messages = self._mailbox.receive(timeout_s)
        for message in messages:
            match message:
                case Generate():
                    self._admit(message)
                case Abort():
                    self._abort(message)
                case Unreadable():
                    log.error("a message could not be read: %s", message.reason)
                    self._refuse(message.request_id, message.num_choices, 0, RequestError("the request holds a value of a wrong type"))
                case Shutdown():
                    self._is_stopping = True
                case _:
                    log.error("a %s arrived after start-up", type(message).__name__)
        if self._events:
            self._deliver(0, 0.0)
        return bool(messages)

    def _admit(self, wanted: Generate) -> None:
        try:
            lane = self._lanes.get(wanted.model)
            if lane is None:
                raise ModelNotFoundError(f"there is no model {wanted.model!r} here", param="model")
            check_request(wanted, lane.info)
            now = self._clock()
            request = Request(
                request_id=wanted.request_id,
                prompts=(tuple(wanted.prompt),),
                sampling=wanted.sampling,
                num_choices=wanted.num_choices,
                priority=wanted.priority,
                deadline=now + wanted.timeout_s if wanted.timeout_s else None,
                tenant=wanted.tenant,
            )
            lane.scheduler.add(request, now)
            self._is_unchecked = True
        except BraidError as error:
            self._refuse(wanted.request_id, wanted.num_choices, len(wanted.prompt), error)
        except Exception:
            log.exception("request %s could not be taken in", wanted.request_id)
            self._refuse(
                wanted.request_id, wanted.num_choices, len(wanted.prompt), EngineError("the engine could not take this request in")
            )

    def _refuse(self, request_id: str, num_choices: int, prompt_len: int, error: BraidError) -> None:
        """One end for each choice, of a request that no scheduler has seen."""
        usage = Usage(prompt_len, 0, 0, 0.0, 0.0, 0.0)
        for choice in range(min(max(num_choices, 1), MAX_CHOICES)):
            self._events.append(Event(request_id, choice, [], finish="error", usage=usage, error=error.message, error_status=error.status))

    def _abort(self, abort: Abort) -> None:
        finish: Finish = "stop" if abort.finished else "abort"
        for lane in self._lanes.values():
            try:
                self._take(lane.scheduler.abort(abort.request_id, abort.choice, finish, self._clock()))
            except Exception:
                log.exception("request %s could not be aborted", abort.request_id)

    def _step(self, lane: Lane) -> bool:
        """One step of one model; False when it had nothing to compute."""
        started = self._clock()
        try:
            plan, outputs = lane.scheduler.plan(started)
        except Exception:
            log.exception("planning a step of %s failed", lane.info.name)
            self._count_failure()
            return False
        self._take(outputs)
        if plan is None:
            if self._events:
                self._deliver(0, 0.0)
            return False
        num_tokens = plan.num_tokens
        self.pulse.begin(started, lane.estimate.of(num_tokens))
        is_good = self._compute(lane, plan)
        self.pulse.end()
        seconds = self._clock() - started
        if is_good:
            lane.estimate.learn(num_tokens, seconds)
        self._deliver(num_tokens, seconds, lane.info.name)
        return True

    def _compute(self, lane: Lane, plan: StepPlan) -> bool:
        """Runs the plan and commits it. A failure ends the requests that are in it and nothing else."""
        try:
            drawn = lane.runner.sample(lane.runner.forward(plan))
            check_drawn(plan, drawn, lane.info.vocab_size)
            self._take(lane.scheduler.commit(plan, drawn, self._clock()))
        except Exception:
            log.exception(
                "step %d of %s failed (%d tokens of %d sequences)", plan.step_id, lane.info.name, plan.num_tokens, len(plan.slices)
            )
            self._fail(lane, plan)
            return False
        self._num_failures = 0
        return True

    def _fail(self, lane: Lane, plan: StepPlan) -> None:
        try:
            self._take(lane.scheduler.fail(plan, self._clock()))
        except Exception as error:
            # The books can't be trusted any more; going on could mix up what belongs to whom.
            log.exception("the failed step of %s could not be undone", lane.info.name)
            raise BrokenEngineError("the engine could not recover from a failed step") from error
        self._count_failure()

    def _count_failure(self) -> None:
        self._num_failures += 1
        if self._num_failures >= MAX_FAILURES:
            raise BrokenEngineError(f"{self._num_failures} steps in a row failed")

    def _take(self, outputs: Sequence[Output]) -> None:
        self._events.extend(to_event(output) for output in outputs)

    def _deliver(self, num_tokens: int, seconds: float, model: str = "") -> None:
        events, self._events = self._events, []
        stats = [lane.stats() for lane in self._lanes.values()]
        self._mailbox.send(Delivery(events=events, stats=stats, step_tokens=num_tokens, step_s=seconds, step_model=model))


def check_request(wanted: Generate, info: ModelInfo) -> None:
    """What would poison a kernel or the books, looked at once more. Raises: RequestError."""
    if not 1 <= wanted.num_choices <= MAX_CHOICES:
        raise RequestError(f"the number of choices must be between 1 and {MAX_CHOICES}", param="n")
    if not wanted.prompt:
        raise RequestError("the prompt is empty", param="prompt")
    if not (min(wanted.prompt) >= 0 and max(wanted.prompt) < info.vocab_size):
        raise RequestError(f"the prompt holds a token id that is not in the vocabulary of {info.vocab_size}", param="prompt")
    if not (math.isfinite(wanted.timeout_s) and wanted.timeout_s >= 0):
        raise RequestError("timeout must be a number of seconds", param="timeout")
    if wanted.sampling.seed + wanted.num_choices > 2**63:
        # Choice i draws with seed + i, which must stay a 64-bit number.
        raise RequestError("seed + n must be at most 2**63", param="seed")
    try:
        wanted.sampling.check(info.vocab_size)
    except ValueError as error:
        raise RequestError(str(error)) from None


def check_drawn(plan: StepPlan, drawn: Sequence[Drawn], vocab_size: int) -> None:
    """Raises: RuntimeError when a runner's answer does not fit its plan."""
    if len(drawn) != len(plan.samples):
        raise RuntimeError(f"{len(plan.samples)} ids were to be drawn and {len(drawn)} came")
    if any(not 0 <= one.token < vocab_size for one in drawn):
        raise RuntimeError("an id outside of the vocabulary was drawn")


def to_event(output: Output) -> Event:
    """One choice's output as it goes up."""
    logprobs = None
    drawn = output.drawn
    if output.token is not None and drawn is not None and drawn.logprob is not None:
        logprobs = [TokenLogprob(drawn.logprob, list(drawn.top))]
    usage = output.usage
    return Event(
        output.request_id,
        output.choice,
        [] if output.token is None else [output.token],
        logprobs,
        output.finish,
        output.stop_id,
        None
        if usage is None
        else Usage(
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            usage.queue_s,
            usage.prefill_s,
            usage.decode_s,
            usage.preemptions,
        ),
        STEP_FAILED if output.finish == "error" else None,
    )
