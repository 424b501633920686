"""The scheduler's face: requests in, plans out, drawn ids in, outputs out. Called by the engine loop alone.

Each `plan` is followed by its `commit` (or `fail`), in the order of the plans. One step may be planned ahead of the commit of the one
before it, when the runner computes in the order in which it is told: a block that a step writes and that is given away meanwhile is written
by its next holder later than that. `add` and `abort` may come at any time. Who runs is `roster`'s affair, blocks are `tables`'s;
here are requests and their ends. No clock (time is the argument `now`, in seconds), no thread, no I/O.
Long, because add, abort, plan, commit and fail are the transitions of one table of live requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from itertools import count

from service.errors import RequestError
from service.scheduling.block_pool import BlockKey, BlockPool
from service.scheduling.budget import PromptLimit
from service.scheduling.drafts import DRAFT_KINDS, Drafter, DraftWishes, JacobiDrafter, LookupDrafter, ModelDrafter
from service.scheduling.flight import Flight, make_flight, settle_drafts
from service.scheduling.grammar import Grammar, GrammarError
from service.scheduling.intake import Intake
from service.scheduling.pictures import PictureQueue, PictureRequest
from service.scheduling.plan import PENDING, Drawn, KVGroup, PictureResult, PromptReading, StepPlan
from service.scheduling.reader import PromptReader
from service.scheduling.roster import MAX_DRAFTING, Roster
from service.scheduling.sequence import Finish, Gang, Output, Request, Sequence, State, Stats
from service.scheduling.tables import BlockTables
from service.vocabulary import PictureIds


@dataclass(eq=False, slots=True)
class _Live:
    """A request that has choices left to end. is_counted: has no choice of it had a slice yet?"""

    request: Request
    gangs: dict[int, Gang]
    is_counted: bool = True


class Scheduler:
    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        groups: tuple[KVGroup, ...],
        max_batch_tokens: int,
        max_sequences: int,
        max_context: int,
        has_prefix_cache: bool = True,
        whole_prompts: bool = False,
        pictures: PictureIds | None = None,
        max_drafting: int = MAX_DRAFTING,
        has_draft_model: bool = False,
        max_waiting_requests: int = 1024,
        max_waiting_tokens: int = 2**20,
    ) -> None:
        """max_batch_tokens: of a step. max_sequences: running at once. max_context: prompt and output of one sequence, in tokens.
        whole_prompts: what a sequence has to compute goes into one step or waits, so none may be longer than max_batch_tokens.
        pictures: which ids are codes, of a model that must be told where their pictures begin. max_drafting: running sequences, above
        which no ids are guessed ahead. has_draft_model: does somebody answer `draft_wishes`?
        max_waiting_*: of requests without a slice so far. Raises: ValueError for a size below 1 or no group."""
        queue = (max_waiting_requests, max_waiting_tokens)
        if min(num_blocks, block_size, len(groups), max_batch_tokens, max_sequences, max_context, *queue) < 1:
            raise ValueError("every size of a scheduler must be at least 1")
        self._pool = BlockPool(num_blocks, len(groups))
        self._tables = BlockTables(self._pool, groups, block_size, has_prefix_cache=has_prefix_cache, whole_prompts=whole_prompts)
        self._roster = Roster(
            self._tables,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            whole_prompts=whole_prompts,
            max_drafting=max_drafting,
        )
        self._work = PictureQueue()
        self._intake = Intake(
            self._tables,
            max_context=max_context,
            max_step=max_batch_tokens if whole_prompts else None,
            max_gang=min(max_batch_tokens, max_sequences),
            max_requests=max_waiting_requests,
            max_tokens=max_waiting_tokens,
        )
        self._pictures = pictures
        self._has_draft_model = has_draft_model
        self._num_drafts, self._num_right = dict.fromkeys(DRAFT_KINDS, 0), dict.fromkeys(DRAFT_KINDS, 0)
        self._live: dict[str, _Live] = {}
        self._flights: list[Flight] = []
        self._earliest_deadline = math.inf
        self._arrivals, self._sequence_ids = count(), count()
        self._released: list[int] = []
        self._steps = self._prompt_tokens = self._generation_tokens = 0

    # -- questions --

    @property
    def has_work(self) -> bool:
        return bool(self._live) or len(self._work) > 0

    @property
    def num_decoding(self) -> int:
        """Running sequences that wait for their next token alone; prompts beside them make them wait longer."""
        return self._roster.num_decoding

    @property
    def num_running(self) -> int:
        return len(self._roster.running)

    @property
    def num_waiting(self) -> int:
        return len(self._roster.waiting)

    @property
    def stats(self) -> Stats:
        roster, pool = self._roster, self._pool
        return Stats(
            running=len(roster.running),
            waiting=len(roster.waiting),
            kv_blocks_used=pool.num_used,
            kv_blocks_cached=pool.num_cached,
            kv_blocks_total=pool.num_blocks,
            preemptions=roster.preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_queries=roster.prefix_queries,
            prefix_hits=roster.prefix_hits,
            steps=self._steps,
            drafts={kind: (count, self._num_right[kind]) for kind, count in self._num_drafts.items()},
        )

    # -- requests come and go --

    def add(self, request: Request, now: float) -> None:
        """Takes a request into the queue; its max_tokens is held to what the context and the pool allow.

        Raises: RequestError for a malformed one, ContextLengthError when it can never fit, OverloadedError when the queue is full.
        """
        if request.request_id in self._live or request.request_id in self._work:
            raise RequestError("a request with this id is being served")
        self._intake.check_request(request)
        max_tokens = min(request.sampling.max_tokens, self._intake.max_new_tokens(request))
        self._intake.enter(request)
        live = _Live(request, {index: self._make_gang(request, index, max_tokens, now) for index in range(request.num_choices)})
        self._live[request.request_id] = live
        for gang in live.gangs.values():
            self._roster.enqueue(gang)
        if request.deadline is not None:
            self._earliest_deadline = min(self._earliest_deadline, request.deadline)

    def add_picture(self, request: PictureRequest, now: float) -> None:
        """Takes in a picture to be read or drawn. Raises: RequestError for an id that is in use."""
        if request.work.request_id in self._live or request.work.request_id in self._work:
            raise RequestError("a request with this id is being served")
        self._work.add(request, now)
        if request.deadline is not None:
            self._earliest_deadline = min(self._earliest_deadline, request.deadline)

    def commit_pictures(self, results: Iterable[PictureResult], now: float) -> list[Output]:
        """Some of what plans told to encode or draw is done. May come at any time."""
        return self._work.commit(results, now)

    def abort(self, request_id: str, choice: int | None, finish: Finish, now: float) -> list[Output]:
        """Ends all choices of a request, or one, in whatever state; unknown and ended ones are no error. Blocks are free at once."""
        live = self._live.get(request_id)
        if live is None:
            return self._work.abort(request_id, finish, now)
        return [self._end(gang, finish, now) for gang in list(live.gangs.values()) if choice is None or gang.choice == choice]

    def expire(self, now: float) -> list[Output]:
        """Ends what is past its deadline; `plan` does it first."""
        if now < self._earliest_deadline:
            return []
        late = [live for live in self._live.values() if live.request.deadline is not None and live.request.deadline <= now]
        outputs = [self._end(gang, "deadline", now) for live in late for gang in list(live.gangs.values())]
        deadlines = (live.request.deadline for live in self._live.values())
        self._earliest_deadline = min((deadline for deadline in deadlines if deadline is not None), default=math.inf)
        outputs += self._work.expire(now)
        self._earliest_deadline = min(self._earliest_deadline, self._work.earliest_deadline)
        return outputs

    # -- steps --

    def draft_wishes(self) -> DraftWishes:
        """What a draft model may guess for the next plan, which is made with its answer; a wish is no promise."""
        return self._roster.draft_wishes()

    def plan(
        self,
        now: float,
        limit: PromptLimit | None = None,
        drafts: Mapping[int, SequenceOf[int]] | None = None,
        *,
        is_ahead: bool = False,
    ) -> tuple[StepPlan | None, list[Output]]:
        """The next step, None when there is nothing to do, and the outputs of choices that ended on their deadline. limit: of what prompts
        may cost in it; whoever asks knows whether somebody waits. It changes no id, and holds no prompt that can't be cut. drafts: ids that
        a draft model guessed, by sequence. is_ahead: the last plan may be in flight still; who goes on whatever comes of it is planned as
        if it had gone well, with `PENDING` for the id that it draws; None where nobody does.

        Raises: RuntimeError when the last plan, or with is_ahead the one before it, was neither committed nor failed.
        """
        if len(self._flights) > is_ahead:
            raise RuntimeError(f"step {self._flights[0].plan.step_id} was planned and not committed")
        outputs = self.expire(now)
        if not self.has_work:
            return None, outputs
        for flight in self._flights:
            self._foresee(flight)
        chosen = self._roster.choose(limit, is_ahead=bool(self._flights))
        work = self._work.take(now)
        if not chosen and not work:
            return None, outputs
        for gang in chosen:
            if gang.first_slice_at is None:
                self._start(gang, now)
        if not self._flights:
            self._roster.add_drafts(chosen, drafts or {})
        flight = make_flight(self._steps, chosen, work, tuple(self._released), self._pictures)
        self._flights.append(flight)
        self._steps += 1
        self._released = []
        return flight.plan, outputs

    def commit(self, plan: StepPlan, drawn: SequenceOf[Drawn], now: float, readings: SequenceOf[PromptReading] = ()) -> list[Output]:
        """The step was computed: seals full blocks, keeps the readings (one per read, in order), appends the drawn ids (one per sample, in
        order), ends what is done.

        Raises: RuntimeError when this is not the oldest plan in flight; ValueError when drawn or readings differ in number from it.
        """
        if len(drawn) != len(plan.samples):
            raise ValueError(f"{len(drawn)} ids were drawn for {len(plan.samples)} samples")
        if len(readings) != len(plan.reads):
            raise ValueError(f"{len(readings)} readings came for {len(plan.reads)} reads")
        flight = self._require_flight(plan)
        if flight is not self._flights[0]:
            raise RuntimeError(f"step {plan.step_id} has another in front of it")
        self._flights.remove(flight)
        by_gang = flight.by_gang(drawn)
        num_right = {gang: settle_drafts(gang, ids) for gang, ids in by_gang.items() if gang.num_drafts}
        self._count_drafts(by_gang, num_right)
        for gang, counts in flight.chosen.items():
            if gang.state is State.RUNNING:  # else aborted while the step ran
                num_wrong = len(by_gang[gang]) - 1 - num_right[gang] if gang in num_right else 0
                if gang not in flight.foreseen:
                    self._roster.advance(gang, tuple(count - num_wrong for count in counts) if num_wrong else counts)
                self._roster.settle(gang)
            gang.is_held = False
        for reader, reading in zip(flight.readers, readings, strict=True):
            reader.take(reading)
        concluded = [(flight.sampled[index], error) for index, error in flight.concluded.items()]
        outputs = [self._conclude(gang, error, now) for gang, error in concluded if gang.state is State.RUNNING]
        for gang, ids in by_gang.items():
            last = num_right.get(gang, 0)
            for place, one in enumerate(ids[: last + 1]):
                outputs += self._accept(gang, one, now, is_known=place < last)
        return outputs + [self._complete(gang, now) for gang in flight.ending if gang.state is State.RUNNING]

    def grammars(self, plan: StepPlan) -> list[Grammar | None]:
        """Of each sample of a plan in flight, None where its choice has ended meanwhile; how they stand tells nothing before the steps in
        front of it are committed. Raises: RuntimeError when this is none."""
        return [gang.grammar if gang.state is State.RUNNING else None for gang in self._require_flight(plan).sampled]

    def conclude(self, plan: StepPlan, index: int, error: GrammarError | None) -> None:
        """The choice of this sample of a plan in flight ends at `commit`, with "error" or, without one, "stop"; what is drawn for it
        is of no account. Raises: RuntimeError when this is no plan in flight."""
        self._require_flight(plan).concluded[index] = error

    def fail(self, plan: StepPlan, now: float) -> list[Output]:
        """The step failed: ends with "error" the gangs in it; others live on, and so do pictures, which are worked on elsewhere.

        Raises: RuntimeError when this is no plan in flight.
        """
        flight = self._require_flight(plan)
        self._flights.remove(flight)
        return [self._end(gang, "error", now) for gang in flight.chosen if gang.state is State.RUNNING]

    def check(self) -> None:
        """Integrity of everything; cheap enough for tests and idle moments. Raises: AssertionError naming the first broken promise."""
        self._roster.check()
        gangs = [gang for live in self._live.values() for gang in live.gangs.values()]
        listed = [*self._roster.running, *self._roster.waiting]
        if sorted(map(id, gangs)) != sorted(map(id, listed)):
            raise AssertionError("the live choices are not those that run or wait")
        if any(not live.gangs for live in self._live.values()):
            raise AssertionError("a request without choices lives on")
        counted = [live.request.num_prompt_tokens for live in self._live.values() if live.is_counted]
        if (len(counted), sum(counted)) != (self._intake.num_requests, self._intake.num_tokens):
            raise AssertionError("the waiting requests or tokens were counted wrong")
        if any(gang.tokens_left < min(gang.params.max_tokens, 1) for gang in gangs):
            raise AssertionError("a choice lives past its last token")
        if any(gang.num_generated and gang.reader is not None for gang in gangs):
            raise AssertionError("a choice went on without what it read")
        if any(sequence.num_sealed > len(sequence.keys) for gang in gangs for sequence in gang.sequences) and self._tables.has_prefix_cache:
            raise AssertionError("a sealed block has no key")
        if not self._flights and any(gang.num_drafts or gang.is_held or gang.is_ahead for gang in gangs):
            raise AssertionError("a guess, a hold or a pending id outlived its step")
        if any((PENDING in sequence.tokens) != gang.is_ahead for gang in gangs for sequence in gang.sequences):
            raise AssertionError("an id is pending that nobody draws, or the other way round")
        self._work.check()

    # -- making plans --

    def _make_gang(self, request: Request, choice: int, max_tokens: int, now: float) -> Gang:
        groups = len(self._tables.groups)
        root = BlockKey.root(request.tenant)
        grammar = request.grammars[choice] if request.grammars else None
        return Gang(
            request=request,
            choice=choice,
            params=replace(request.sampling, seed=request.sampling.seed + choice, max_tokens=max_tokens),
            sequences=tuple(
                Sequence(next(self._sequence_ids), list(prompt), root, [[] for _ in range(groups)], [0] * groups)
                for prompt in request.prompts
            ),
            rank=(request.priority, next(self._arrivals)),
            arrived_at=now,
            grammar=grammar,
            drafter=self._make_drafter(request),
            reader=PromptReader(request.read, request.prompts[0]) if request.read is not None and choice == 0 else None,
        )

    def _make_drafter(self, request: Request) -> Drafter | None:
        """A choice whose penalties count what it has said can't be guessed ahead: wrong guesses would count."""
        if not request.draft_len or request.sampling.has_penalties:
            return None
        if self._pictures is None:
            return ModelDrafter() if self._has_draft_model else LookupDrafter()
        return JacobiDrafter(self._pictures) if request.grammars else None

    def _start(self, gang: Gang, now: float) -> None:
        """Its first slice: the first choice to come here takes its request out of the count of those that wait."""
        gang.first_slice_at = now
        live = self._live[gang.request.request_id]
        if live.is_counted:
            live.is_counted = False
            self._intake.leave(gang.request)
            self._prompt_tokens += gang.prompt_len

    # -- after a step --

    def _require_flight(self, plan: StepPlan) -> Flight:
        flight = next((flight for flight in self._flights if flight.plan is plan), None)
        if flight is None:
            raise RuntimeError(f"step {plan.step_id} is not in flight")
        return flight

    def _foresee(self, flight: Flight) -> None:
        """Its gangs as they will be if all goes well. Mutates: them, and the flight."""
        drawing = set(flight.sampled)
        for gang, counts in flight.chosen.items():
            if gang.state is State.RUNNING and gang not in flight.foreseen:
                is_drawn = gang in drawing
                # Where no grammar says it, nobody knows whether the id will be a code.
                if gang in flight.ending or (is_drawn and gang.grammar is None and self._pictures is not None):
                    gang.is_held = True
                elif self._roster.foresee(gang, counts, is_drawn):
                    flight.foreseen.add(gang)

    def _count_drafts(self, by_gang: Mapping[Gang, SequenceOf[Drawn]], num_right: Mapping[Gang, int]) -> None:
        for gang, right in num_right.items():
            if gang.drafter is not None:
                self._num_drafts[gang.drafter.kind] += len(by_gang[gang]) - 1
                self._num_right[gang.drafter.kind] += right

    def _accept(self, gang: Gang, drawn: Drawn, now: float, *, is_known: bool = False) -> list[Output]:
        """A drawn id, and those that have to follow it; nothing of a gang that has ended. Mutates: gang."""
        outputs = [self._append(gang, drawn, now, is_known)] if gang.state is State.RUNNING else []
        while gang.state is State.RUNNING and gang.grammar is not None and not is_known and (forced := gang.grammar.forced()):
            certain = Drawn(forced[0], None if gang.params.logprobs is None else 0.0)
            outputs.append(self._append(gang, certain, now, False))
        return outputs

    def _append(self, gang: Gang, drawn: Drawn, now: float, is_known: bool) -> Output:
        """Appends an id to every sequence of the gang, or ends it. is_known: it was guessed, and stands there already. Mutates: gang."""
        if gang.first_token_at is None:
            gang.first_token_at = now
        gang.num_generated += 1
        self._generation_tokens += 1
        if drawn.token in gang.params.stop_ids:
            return self._end(gang, "stop", now, stop_id=drawn.token)
        try:
            is_complete = gang.grammar is not None and gang.grammar.accept(drawn.token)
        except GrammarError as error:
            return self._end(gang, "error", now, error=error)
        if is_complete:
            return self._end(gang, "stop", now, drawn=drawn)
        if gang.num_generated >= gang.params.max_tokens:
            return self._end(gang, "length", now, drawn=drawn)
        for sequence in gang.sequences if not is_known else ():
            sequence.learn(drawn.token)
        gang.is_ahead = False
        if gang.reader is None:
            return Output(gang.request.request_id, gang.choice, drawn.token, drawn)
        return Output(gang.request.request_id, gang.choice, drawn.token, drawn, reading=_tell(gang))

    def _conclude(self, gang: Gang, error: GrammarError | None, now: float) -> Output:
        return self._end(gang, "stop" if error is None else "error", now, error=error)

    def _complete(self, gang: Gang, now: float) -> Output:
        """Ends a gang that wants no id, now that its prompt is computed. Mutates: gang."""
        gang.first_token_at = now
        return self._end(gang, "length", now)

    def _end(
        self,
        gang: Gang,
        finish: Finish,
        now: float,
        *,
        stop_id: int | None = None,
        drawn: Drawn | None = None,
        error: GrammarError | None = None,
    ) -> Output:
        """The one place where a choice ends. Mutates: everything that knew it."""
        if gang.is_ahead:
            gang.is_ahead = False
            for sequence in gang.sequences:
                sequence.drop(1)
        self._roster.remove(gang)
        if gang.first_slice_at is not None:
            self._released.extend(sequence.sequence_id for sequence in gang.sequences)
        live = self._live[gang.request.request_id]
        del live.gangs[gang.choice]
        if not live.gangs:
            del self._live[gang.request.request_id]
            if live.is_counted:
                self._intake.leave(live.request)
        token = drawn.token if drawn else None
        return Output(gang.request.request_id, gang.choice, token, drawn, finish, stop_id, gang.usage(now), error, _tell(gang))


def _tell(gang: Gang) -> PromptReading | None:
    """What was read of its prompt, once, as soon as all of it is known. Mutates: gang.reader, which has no more to do."""
    reader = gang.reader
    if reader is None or not reader.is_done:
        return None
    gang.reader = None
    return reader.reading()
