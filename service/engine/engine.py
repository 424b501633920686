"""The loop of the engine process: drain the mailbox, plan, run, commit, deliver; and the wall that keeps a fault of one request
from being anybody else's.

Where the device computes beside this process, a step is begun before the one in front of it is known, so that the device never waits for
the host: plan and begin n + 1, wait for the ids of n, commit n, have the ids of n + 1 drawn (masks and ends are those that n brought).
It owns no device and no socket: lanes (scheduler + runner) and the mailbox are given to it by `service/worker.py`. No text, no HTTP.
Long, because every way a request can come in or end leads through one loop and one list of events; see also `checks` and `events`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from service.engine.checks import check_drawn, check_picture, check_readings, check_request
from service.engine.constraint import Constraint, Constraints, Waiting
from service.engine.drafting import Drafting
from service.engine.events import merged, parcels
from service.engine.mailbox import Mailbox
from service.engine.messages import (
    MAX_CHOICES,
    Abort,
    Delivery,
    Event,
    Generate,
    LaneStats,
    ModelInfo,
    Picture,
    Shutdown,
    Unreadable,
    Usage,
    Vocabulary,
)
from service.engine.pace import Pulse, StepEstimate
from service.engine.picture_masks import PictureMasks
from service.engine.prompt_pace import PromptPace
from service.errors import BraidError, EngineError, ModelNotFoundError, RequestError
from service.scheduling.budget import PromptLimit
from service.scheduling.grammar import Grammar, GrammarError
from service.scheduling.picture_grammar import PictureGrammar, PictureRule
from service.scheduling.pictures import PictureRequest
from service.scheduling.plan import Drawn, PictureResult, PictureWork, PromptReading, RunnerCounts, StepPlan
from service.scheduling.scheduler import Scheduler
from service.scheduling.sequence import Finish, Output, Request

log = logging.getLogger("braid.engine")

# After so many failed steps without a good one between, the device or the weights are broken and a fresh process is the cure.
MAX_FAILURES = 10
# How long nobody must have asked for anything before the books are checked: the check walks all blocks.
CALM_S = 1.0
# When sequences wait but none can be planned, or grammars are being compiled: only a message, a wake or a deadline can change that.
BLOCKED_WAIT_S = 0.02
_NOTHING_LEFT = "every id that may come next behind a picture is a stop id, and min_tokens is not reached"
GRAMMAR_CODES = ("invalid_json_schema", "invalid_grammar")


class Runner(Protocol):
    """What a lane needs from whoever owns the device."""

    def forward(self, plan: StepPlan) -> Any: ...

    def sample(self, handle: Any, masks: Any = None) -> list[Drawn]: ...

    def read(self, handle: Any) -> list[PromptReading]: ...


class Drawing(Protocol):
    """Ids that are being drawn."""

    def wait(self) -> list[Drawn]: ...


class Ahead(Runner, Protocol):
    """A runner that computes what it is told in the order in which it is told, and does not wait for it."""

    def draw(self, handle: Any, masks: Any = None) -> Drawing:
        """`sample`, of which `wait` is the rest. A `PENDING` id of any later step is the one drawn here."""


class Painter(Protocol):
    """Turns pictures into codes and codes into pictures, in a thread of its own. on_done: called there when there are results."""

    on_done: Callable[[], None]

    def begin(self, work: Sequence[PictureWork]) -> None: ...

    def finished(self) -> list[PictureResult]:
        """Of what was begun, each once, also what failed."""


class BrokenEngineError(EngineError):
    """Steps keep failing; only a fresh process can help."""


@dataclass(eq=False, slots=True)
class Flying:
    """A step that was begun: since when, what the runner made of it, and its ids, or what draws them; at last how long it took."""

    plan: StepPlan
    started: float
    handle: Any
    drawing: Drawing | None = None
    drawn: list[Drawn] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(eq=False, slots=True)
class Lane:
    """One model: what it is, who decides, who computes, who paints, who guesses, how long its steps take and how long its prompts may hold
    them up. counts: what its runner counts. ahead: its runner, where steps are begun one ahead; flying: the one that was, while another is
    not."""

    info: ModelInfo
    scheduler: Scheduler
    runner: Runner
    painter: Painter | None = None
    estimate: StepEstimate = field(default_factory=StepEstimate)
    pace: PromptPace = field(default_factory=PromptPace)
    constraints: Constraints | None = None  # once the model's vocabulary is known
    masks: PictureMasks | None = field(init=False)
    drafting: Drafting | None = None
    counts: Callable[[], RunnerCounts] = RunnerCounts
    ahead: Ahead | None = None
    flying: Flying | None = None

    def __post_init__(self) -> None:
        self.masks = PictureMasks(self.info.pictures, self.info.vocab_size) if self.info.pictures is not None else None

    @property
    def is_compiling(self) -> bool:
        return self.constraints is not None and self.constraints.num_waiting > 0

    def learn(self, step: Flying) -> None:
        """It is known: takes what it cost into account."""
        self.estimate.learn(step.plan.num_tokens, step.seconds)
        if self.drafting is not None:
            self.drafting.learn(step.plan)
        self.pace.learn(step.plan, step.seconds)

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
            drafts=stats.drafts,
            **self.counts()._asdict(),
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
        self._finished = 0.0  # when a step of any lane was known last: the device computes in order, so those begun earlier waited for it
        self._is_stopping = False
        self._is_unchecked = False
        for lane in lanes:
            if lane.painter is not None:
                lane.painter.on_done = mailbox.wake

    def run(self) -> None:
        """Until `Shutdown` or the end of the peer. Raises: BrokenEngineError."""
        try:
            self._loop()
        finally:
            for lane in self._lanes.values():
                if lane.constraints is not None:
                    lane.constraints.close()

    def _loop(self) -> None:
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
        if any(lane.scheduler.has_work or lane.is_compiling for lane in self._lanes.values()):
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
        self._settle()
        for message in messages:
            match message:
                case Generate():
                    self._admit(message)
                case Picture():
                    self._admit_picture(message)
                case Abort():
                    self._abort(message)
                case Vocabulary():
                    self._learn(message)
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
            constraints = None if not wanted.grammar else self._constrain(lane, wanted, now)
            if wanted.grammar and constraints is None:
                return  # its grammar is being compiled
            self._start(lane, wanted, now, constraints or ())
        except BraidError as error:
            self._refuse_wanted(wanted, error)
        except Exception:
            log.exception("request %s could not be taken in", wanted.request_id)
            self._refuse_wanted(wanted, EngineError("the engine could not take this request in"))

    def _start(self, lane: Lane, wanted: Generate, arrived: float, constraints: Sequence[Constraint]) -> None:
        """Hands a request to its scheduler. Raises: BraidError."""
        request = Request(
            request_id=wanted.request_id,
            prompts=(tuple(wanted.prompt), tuple(wanted.unconditional)) if wanted.unconditional else (tuple(wanted.prompt),),
            sampling=wanted.sampling,
            num_choices=wanted.num_choices,
            priority=wanted.priority,
            deadline=arrived + wanted.timeout_s if wanted.timeout_s else None,
            tenant=wanted.tenant,
            guidance=wanted.guidance,
            grammars=tuple(constraints) or self._picture_grammars(lane, wanted),
            draft_len=wanted.draft_len,
            read=wanted.read,
        )
        lane.scheduler.add(request, arrived)
        self._is_unchecked = True

    @staticmethod
    def _picture_grammars(lane: Lane, wanted: Generate) -> tuple[Grammar, ...]:
        """A model with pictures follows a grammar always, so that its codes stand nowhere but in pictures."""
        pictures, rule = lane.info.pictures, wanted.pictures or PictureRule()
        if pictures is None or not wanted.sampling.max_tokens:
            return ()
        return tuple(PictureGrammar(pictures, rule, wanted.sampling.max_tokens) for _ in range(wanted.num_choices))

    def _admit_picture(self, wanted: Picture) -> None:
        try:
            lane = self._lanes.get(wanted.model)
            if lane is None:
                raise ModelNotFoundError(f"there is no model {wanted.model!r} here", param="model")
            check_picture(wanted, lane.info)
            now = self._clock()
            work = PictureWork(wanted.request_id, wanted.pixels, tuple(wanted.codes))
            deadline = now + wanted.timeout_s if wanted.timeout_s else None
            lane.scheduler.add_picture(PictureRequest(work, wanted.priority, deadline), now)
            self._is_unchecked = True
        except BraidError as error:
            self._refuse(wanted.request_id, 1, 0, error)
        except Exception:
            log.exception("picture %s could not be taken in", wanted.request_id)
            self._refuse(wanted.request_id, 1, 0, EngineError("the engine could not take this picture in"))

    def _refuse_wanted(self, wanted: Generate, error: BraidError) -> None:
        if wanted.grammar and error.param is None and error.code in GRAMMAR_CODES:
            error.param = wanted.grammar_param
        self._refuse(wanted.request_id, wanted.num_choices, len(wanted.prompt), error)

    def _refuse(self, request_id: str, num_choices: int, prompt_len: int, error: BraidError) -> None:
        """One end for each choice, of a request that no scheduler has seen."""
        usage = Usage(prompt_len, 0, 0, 0.0, 0.0, 0.0)
        for choice in range(min(max(num_choices, 1), MAX_CHOICES)):
            self._events.append(
                Event(
                    request_id,
                    choice,
                    [],
                    finish="error",
                    usage=usage,
                    error=error.message,
                    error_status=error.status,
                    error_param=error.param,
                    error_code=error.code,
                )
            )

    # Grammars

    def _learn(self, vocabulary: Vocabulary) -> None:
        lane = self._lanes.get(vocabulary.model)
        if lane is None:
            log.error("a vocabulary came for %r, which is not served", vocabulary.model)
            return
        lane.constraints = lane.constraints or Constraints(lane.info.vocab_size, self._mailbox.wake)
        lane.constraints.teach(vocabulary)

    def _constrain(self, lane: Lane, wanted: Generate, now: float) -> list[Constraint] | None:
        """A constraint per choice; None when the request waits for them. Raises: BraidError."""
        if lane.constraints is None:
            raise EngineError("a grammar came before the model's vocabulary")
        if lane.constraints.is_waiting(wanted.request_id):
            raise RequestError("a request with this id is being served")
        return lane.constraints.take(wanted, now)

    def _settle(self) -> None:
        """Requests whose grammars are compiled go on; those that waited too long end."""
        for lane in self._lanes.values():
            if lane.constraints is None or not (lane.is_compiling or lane.constraints.has_done):
                continue
            for waiting, indexes in lane.constraints.expire(self._clock()):
                self._end_waiting(waiting, indexes, "deadline")
            for waiting, result in lane.constraints.settle():
                self._resume(lane, waiting, result)

    def _resume(self, lane: Lane, waiting: Waiting, result: list[Constraint] | BraidError) -> None:
        wanted = waiting.request
        first = len(self._events)
        try:
            if isinstance(result, BraidError):
                self._refuse_wanted(wanted, result)
            else:
                self._start(lane, wanted, waiting.arrived, result)
                for choice in waiting.ended:
                    lane.scheduler.abort(wanted.request_id, choice, "abort", self._clock())
        except BraidError as error:
            self._refuse_wanted(wanted, error)
        except Exception:
            log.exception("request %s could not go on with its grammar", wanted.request_id)
            self._refuse_wanted(wanted, EngineError("the engine could not take this request in"))
        # The ends of choices that were aborted meanwhile have been sent.
        self._events[first:] = [event for event in self._events[first:] if event.choice not in waiting.ended]

    def _end_waiting(self, waiting: Waiting, indexes: Sequence[int], finish: Finish) -> None:
        wanted = waiting.request
        usage = Usage(len(wanted.prompt), 0, 0, self._clock() - waiting.arrived, 0.0, 0.0)
        self._events.extend(Event(wanted.request_id, choice, [], finish=finish, usage=usage) for choice in indexes)

    def _masks(self, lane: Lane, plan: StepPlan) -> Any:
        """The masks of a step; tells the scheduler of the choices that must not draw any more."""
        grammars = lane.scheduler.grammars(plan)
        masks = None
        if lane.constraints is not None and any(isinstance(grammar, Constraint) for grammar in grammars):
            constraints = [grammar if isinstance(grammar, Constraint) else None for grammar in grammars]
            masks, stops = lane.constraints.masks.fill(plan.samples, constraints)
            for stop in stops:
                lane.scheduler.conclude(plan, stop.index, stop.error)
        if lane.masks is not None and any(isinstance(grammar, PictureGrammar) for grammar in grammars):
            masks = lane.masks.everything(len(grammars)) if masks is None else masks
            for row, grammar in enumerate(grammars):
                if isinstance(grammar, PictureGrammar):
                    masks[row] = lane.masks.rows[grammar.allowed]
                    if (banned := plan.samples[row].banned) and lane.masks.is_empty(grammar.allowed, banned):
                        lane.scheduler.conclude(plan, row, GrammarError(_NOTHING_LEFT, status=RequestError.status))
        return masks

    # Ends

    def _abort(self, abort: Abort) -> None:
        finish: Finish = "stop" if abort.finished else "abort"
        for lane in self._lanes.values():
            if lane.constraints is not None and (ended := lane.constraints.abort(abort.request_id, abort.choice)) is not None:
                self._end_waiting(*ended, finish)
                return
            try:
                self._take(lane.scheduler.abort(abort.request_id, abort.choice, finish, self._clock()))
            except Exception:
                log.exception("request %s could not be aborted", abort.request_id)

    def _step(self, lane: Lane) -> bool:
        """One step of one model; False when it had nothing to compute."""
        started = self._clock()
        if lane.painter is not None and (results := lane.painter.finished()):
            self._take(lane.scheduler.commit_pictures(results, started))
        before, lane.flying = lane.flying, None
        plan = self._plan(lane, started, is_ahead=before is not None)
        steps = [step for step in (plan, None if before is None else before.plan) if step is not None]
        if not steps:
            if self._events:
                self._deliver(0, 0.0)
            return False
        self.pulse.begin(started, lane.estimate.of(max(step.num_tokens for step in steps)))
        begun = None if plan is None else self._begin(lane, plan, started)
        known = before if before is not None and self._finish(lane, before) else None
        if begun is not None and self._draw(lane, begun):
            if lane.ahead is not None:
                lane.flying = begun
            elif self._finish(lane, begun):
                known = begun
        self.pulse.end()
        if known is not None:
            self._deliver(known.plan.num_tokens, known.seconds, lane.info.name)
        elif self._events:
            self._deliver(0, 0.0)
        return True

    def _plan(self, lane: Lane, now: float, *, is_ahead: bool) -> StepPlan | None:
        try:
            plan, outputs = lane.scheduler.plan(now, self._prompt_limit(lane), self._guess(lane, now), is_ahead=is_ahead)
        except Exception:
            log.exception("planning a step of %s failed", lane.info.name)
            self._count_failure()
            return None
        self._take(outputs)
        if plan is not None and lane.painter is not None and (work := (*plan.encode, *plan.draw)):
            lane.painter.begin(work)
        return plan

    def _prompt_limit(self, lane: Lane) -> PromptLimit | None:
        """While somebody waits for a next token, in whichever lane: they take turns, so that a prompt of one holds up all."""
        if not any(other.scheduler.num_decoding for other in self._lanes.values()):
            return None
        return lane.pace.next_limit(lane.scheduler.num_decoding)

    def _guess(self, lane: Lane, now: float) -> Mapping[int, Sequence[int]]:
        """What the lane's draft model guesses for the coming step. One that fails is given up, and nobody's answer changes."""
        if lane.drafting is None:
            return {}
        self.pulse.begin(now, lane.estimate.of(lane.drafting.max_batch_tokens))
        try:
            return lane.drafting.guess(lane.scheduler.draft_wishes())
        except Exception:
            log.exception("the draft model of %s failed; going on without it", lane.info.name)
            lane.drafting = None
            return {}
        finally:
            self.pulse.end()

    # A failure of any of the three ends the requests that are in the step and nothing else.

    def _begin(self, lane: Lane, plan: StepPlan, now: float) -> Flying | None:
        try:
            return Flying(plan, now, lane.runner.forward(plan))
        except Exception:
            self._fail(lane, plan)
            return None

    def _draw(self, lane: Lane, flying: Flying) -> bool:
        """False when it failed. Every step in front of this one is known."""
        try:
            masks = self._masks(lane, flying.plan)
            if lane.ahead is None:
                flying.drawn = lane.runner.sample(flying.handle, masks)
            else:
                flying.drawing = lane.ahead.draw(flying.handle, masks)
        except Exception:
            self._fail(lane, flying.plan)
            return False
        return True

    def _finish(self, lane: Lane, flying: Flying) -> bool:
        """Waits for what the step has brought, and commits it. False when it failed."""
        plan = flying.plan
        try:
            drawn = flying.drawn if flying.drawing is None else flying.drawing.wait()
            check_drawn(plan, drawn, lane.info.vocab_size)
            readings = lane.runner.read(flying.handle) if plan.reads else []
            check_readings(plan, readings)
            self._take(lane.scheduler.commit(plan, drawn, self._clock(), readings))
        except Exception:
            self._finished = self._clock()
            self._fail(lane, plan)
            return False
        self._num_failures = 0
        now = self._clock()
        flying.seconds = now - max(flying.started, self._finished)
        self._finished = now
        lane.learn(flying)
        return True

    def _fail(self, lane: Lane, plan: StepPlan) -> None:
        """Called where the exception is handled."""
        log.exception("step %d of %s failed (%d tokens of %d sequences)", plan.step_id, lane.info.name, plan.num_tokens, len(plan.slices))
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
        self._events.extend(merged(outputs))

    def _deliver(self, num_tokens: int, seconds: float, model: str = "") -> None:
        *earlier, events = parcels(self._events)
        self._events = []
        for parcel in earlier:
            self._mailbox.send(Delivery(events=parcel, stats=[]))
        stats = [lane.stats() for lane in self._lanes.values()]
        self._mailbox.send(Delivery(events=events, stats=stats, step_tokens=num_tokens, step_s=seconds, step_model=model))
