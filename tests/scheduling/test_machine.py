"""Whatever comes, in whatever order: blocks are conserved, something always moves, every choice ends once with its solo output.

One state machine over a fake model that reads its history back through the block tables (see `model`).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from service.errors import ContextLengthError, OverloadedError, RequestError
from service.scheduling.budget import PromptLimit
from service.scheduling.pictures import PictureRequest
from service.scheduling.plan import KVGroup, PictureResult, PictureWork, StepPlan
from service.scheduling.reading import Read
from service.scheduling.sampling import SamplingParams
from service.scheduling.sequence import Request
from service.vocabulary import PictureIds
from tests.scheduling.model import VOCAB, Bench, CountingGrammar, make_bench, solo, solo_reading

MAX_CONTEXT = 40
GROUPS = (
    (KVGroup(),),
    (KVGroup(window=6),),
    (KVGroup(), KVGroup(window=5, sink=2)),
    (KVGroup(window=9, sink=5), KVGroup(), KVGroup(window=4)),
)
# Text alone; codes among text, so that most pictures are cut short; codes alone, so that one picture follows another.
PICTURES = (None, PictureIds(3, 6, 2, 2, 9, 10, 0), PictureIds(0, VOCAB, 2, 3, 20, 21, 22))
LIMITS = (None, None, PromptLimit(0.0, (1.0,)), PromptLimit(18.0, (1.0,)))
# Prompts are cut from few long rows, so that equal beginnings are common.
ROWS = [tuple((row * 7 + i * i) % VOCAB if i > row * 5 else i % 3 for i in range(MAX_CONTEXT)) for row in range(4)]


class SchedulerMachine(RuleBasedStateMachine):
    bench: Bench
    plan: StepPlan | None = None
    ahead: StepPlan | None = None  # planned behind it

    @initialize(
        num_blocks=st.sampled_from((12, 12, 18, 24)),
        block_size=st.sampled_from((2, 4, 1)),
        groups=st.sampled_from(GROUPS),
        max_batch_tokens=st.sampled_from((8, 64, 8, 3, 2, 1)),
        max_sequences=st.sampled_from((8, 4, 8, 2, 1)),
        has_prefix_cache=st.sampled_from((True, True, True, False)),
        whole_prompts=st.sampled_from((False, False, False, True)),
        pictures=st.sampled_from(PICTURES),
        limit=st.sampled_from(LIMITS),
    )
    def build(self, limit: PromptLimit | None, **sizes: object) -> None:
        self.bench = make_bench(max_context=MAX_CONTEXT, max_waiting_requests=6, max_waiting_tokens=120, **sizes)  # type: ignore[arg-type]
        self.bench.limit = limit
        self.is_whole = bool(sizes["whole_prompts"])
        self.requests: dict[str, Request] = {}
        self.outside: set[tuple[str, int]] = set()  # choices that something other than the model has ended
        self.pictures: set[str] = set()
        self.painting: list[PictureWork] = []
        self.is_blind = sizes["pictures"] is not None
        self.plan = self.ahead = None

    @rule(
        row=st.sampled_from(ROWS),
        length=st.integers(1, 16),
        second=st.sampled_from((None, None, None, 1, 4, 9)),
        params=st.builds(
            SamplingParams,
            max_tokens=st.sampled_from((20, 12, 30, 5, 2, 1)),
            seed=st.integers(0, 2),
            min_tokens=st.integers(0, 4),
            stop_ids=st.sampled_from(((), (), (), (0,), (1, 2))),
            presence_penalty=st.sampled_from((0.0, 1.0)),
        ),
        num_choices=st.sampled_from((1, 1, 2, 5)),
        priority=st.sampled_from((0, 0, 0, -1, 1)),
        patience=st.sampled_from((None, None, None, None, 0, 3, 10, 30)),
        tenant=st.sampled_from(("", "", "other")),
        read=st.none() | st.none() | st.builds(Read, st.integers(0, 16), st.integers(0, 3), st.sampled_from(("", "last", "mean", "cls"))),
        only_reads=st.booleans(),
        grammar=st.none()
        | st.builds(
            CountingGrammar,
            st.integers(1, 16),
            st.sampled_from((None, None, 3)),
            runs=st.sampled_from(({}, {}, {2: (9,)}, {1: (4, 4, 10), 7: (9, 9)})),
        ),
        draft_len=st.sampled_from((0, 2, 7)),
    )
    def add(
        self,
        row: tuple[int, ...],
        length: int,
        second: int | None,
        params: SamplingParams,
        num_choices: int,
        priority: int,
        patience: int | None,
        tenant: str,
        read: Read | None,
        only_reads: bool,
        grammar: CountingGrammar | None,
        draft_len: int,
    ) -> None:
        prompts = (row[:length],) if second is None else (row[:length], row[3 : 3 + second])
        if read is not None:
            read = replace(read, first=min(read.first, length))
            read = read if read.first or read.pool else None
        if read is not None and only_reads:
            params = replace(params, max_tokens=0)
        deadline = None if patience is None else self.bench.now + patience
        request = Request(
            f"r{len(self.requests)}",
            prompts,
            params,
            num_choices,
            priority,
            deadline,
            tenant,
            1.0 if second is None else 3.0,
            read=read,
            grammars=() if grammar is None else tuple(replace(grammar, taken=[], is_blind=self.is_blind) for _ in range(num_choices)),
            draft_len=draft_len,
        )
        before = self.bench.scheduler.stats
        try:
            self.bench.add(request)
        except ContextLengthError:
            runner, blocks = self.bench.runner, before.kv_blocks_total
            rows = sum(-(-len(prompt) // runner.block_size) for prompt in prompts)
            is_too_long = self.is_whole and sum(map(len, prompts)) > runner.max_batch_tokens
            assert is_too_long or rows * len(runner.groups) > blocks, "a prompt that fits was refused"
        except OverloadedError:
            assert before.waiting > 0
        except RequestError:
            assert second is not None
            assert min(self.bench.runner.max_sequences, self.bench.runner.max_batch_tokens) < 2
        else:
            self.requests[request.request_id] = request
            return
        assert self.bench.scheduler.stats == before, "a refused request left something behind"

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), finish=st.sampled_from(("abort", "stop")))
    def abort(self, data: st.DataObject, finish: str) -> None:
        request = self.requests[data.draw(st.sampled_from(sorted(self.requests)))]
        choice = data.draw(st.none() | st.integers(0, request.num_choices - 1))
        outputs = self.bench.scheduler.abort(request.request_id, choice, finish, self.bench.now)  # type: ignore[arg-type]
        self.bench.take(outputs)
        self.outside.update((output.request_id, output.choice) for output in outputs)
        named = range(request.num_choices) if choice is None else (choice,)
        assert all((request.request_id, index) in self.bench.ends for index in named)

    @rule(is_drawn=st.booleans(), patience=st.sampled_from((None, None, 0, 3)), priority=st.integers(-1, 1))
    def add_picture(self, is_drawn: bool, patience: int | None, priority: int) -> None:
        name = f"p{len(self.pictures)}"
        work = PictureWork(name, codes=(3, 4)) if is_drawn else PictureWork(name, pixels=b"abc")
        deadline = None if patience is None else self.bench.now + patience
        self.bench.scheduler.add_picture(PictureRequest(work, priority, deadline), self.bench.now)
        self.pictures.add(name)

    @precondition(lambda self: self.pictures)
    @rule(data=st.data())
    def abort_picture(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.pictures)))
        self.bench.take(self.bench.scheduler.abort(name, None, "abort", self.bench.now))
        assert (name, 0) in self.bench.ends

    @precondition(lambda self: self.painting)
    @rule(count=st.integers(1, 8), is_good=st.booleans())
    def paint(self, count: int, is_good: bool) -> None:
        done, self.painting = self.painting[:count], self.painting[count:]
        results = [PictureResult(one.request_id, codes=(1,) if is_good else ()) for one in done]
        self.bench.take(self.bench.scheduler.commit_pictures(results, self.bench.now))
        assert all((one.request_id, 0) in self.bench.ends for one in done)

    @precondition(lambda self: self.plan is None)
    @rule()
    def make_plan(self) -> None:
        self.plan = self._plan(is_ahead=False)
        if self.plan is None:
            assert self.painting or not self.bench.scheduler.has_work, "something waits and nothing happens"

    @precondition(lambda self: self.plan is not None and self.ahead is None)
    @rule()
    def plan_ahead(self) -> None:
        assert self.plan is not None
        self.bench.launch(self.plan)
        self.ahead = self._plan(is_ahead=True)
        if self.ahead is not None:
            self.bench.launch(self.ahead)
            assert not any(sample.back for sample in self.ahead.samples), "guesses behind what nobody knows"

    def _plan(self, *, is_ahead: bool) -> StepPlan | None:
        known = set(self.bench.ends)
        plan = self.bench.plan(is_ahead=is_ahead)
        if plan is not None and (work := [*plan.encode, *plan.draw]):
            assert not self.painting, "two batches are out"
            self.painting = work
        for key in self.bench.ends.keys() - known:
            if key[0] in self.pictures:
                continue
            deadline = self.requests[key[0]].deadline
            assert self.bench.ends[key].finish == "deadline"
            assert deadline is not None
            assert deadline <= self.bench.now
            self.outside.add(key)
        return plan

    @precondition(lambda self: self.plan is not None)
    @rule()
    def commit(self) -> None:
        assert self.plan is not None
        self.bench.now += 1.0
        self.bench.commit(self.plan)
        self.plan, self.ahead = self.ahead, None

    @rule(times=st.integers(1, 12), is_ahead=st.booleans())
    def step(self, times: int, is_ahead: bool) -> None:
        for _ in range(times):
            if self.plan is None:
                self.make_plan()
            if self.plan is not None and self.ahead is None and is_ahead:
                self.plan_ahead()
            if self.plan is not None:
                self.commit()

    @precondition(lambda self: self.plan is not None)
    @rule()
    def fail(self) -> None:
        assert self.plan is not None
        self._fail(self.plan)
        self.plan, self.ahead = self.ahead, None

    @precondition(lambda self: self.ahead is not None)
    @rule()
    def fail_ahead(self) -> None:
        assert self.ahead is not None
        self._fail(self.ahead)
        self.ahead = None

    def _fail(self, plan: StepPlan) -> None:
        # A failed step may have written anything into its places, and must not be believed; what was found is none of them. What was
        # written there behind it, by whoever got the block, is good.
        later = self._places(self.ahead) if self.ahead is not None and plan is self.plan else set()
        for place in self._places(plan) - later:
            self.bench.runner.places.pop(place, None)
        outputs = self.bench.scheduler.fail(plan, self.bench.now)
        assert all(output.finish == "error" for output in outputs)
        self.bench.take(outputs)
        self.outside.update((output.request_id, output.choice) for output in outputs)

    def _places(self, plan: StepPlan) -> set[tuple[int, int]]:
        size = self.bench.runner.block_size
        return {
            (table[position // size], position % size)
            for piece in plan.slices
            for position in range(piece.start + piece.is_first_known, piece.start + len(piece.tokens))
            for table in piece.tables
        }

    @invariant()
    def is_sound(self) -> None:
        self.bench.scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "requests"):
            return
        self.step(2, False)
        for step in range(3000):
            if not self.bench.scheduler.has_work:
                break
            self.step(1, step % 7 > 2)
            if self.painting and self.plan is None:
                self.paint(8, True)
        scheduler = self.bench.scheduler
        stats = scheduler.stats
        assert not scheduler.has_work, "it never ends"
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
        for request in self.requests.values():
            self._judge(request)
        assert len(self.bench.ends) == sum(request.num_choices for request in self.requests.values()) + len(self.pictures)

    def _judge(self, request: Request) -> None:
        for choice in range(request.num_choices):
            end = self.bench.ends[request.request_id, choice]
            tokens = self.bench.tokens.get((request.request_id, choice), [])
            assert end.usage is not None
            reading = self.bench.readings.get((request.request_id, choice))
            assert reading is None or (choice == 0 and reading == solo_reading(request))
            if (request.request_id, choice) in self.outside:
                expected, _, _ = solo(request, choice, request.sampling.max_tokens)
                assert tokens == expected[: len(tokens)]
                continue
            assert (reading is not None) == (choice == 0 and request.read is not None)
            # The pool may hold less than the context: then the length is what it was cut to, and the tokens still are the solo ones.
            cut = end.usage.completion_tokens if end.finish == "length" else request.sampling.max_tokens
            assert cut <= request.sampling.max_tokens
            assert (tokens, end.finish, end.stop_id) == solo(request, choice, cut)
            assert end.usage.completion_tokens == len(tokens) + (end.finish != "length" and end.token is None)
            assert (end.error is not None) == (end.finish == "error")
            if request.grammars:
                assert request.grammars[choice].taken == tokens, "a grammar was given something else"  # type: ignore[attr-defined]
            assert end.usage.prompt_tokens == len(request.prompts[0])
            assert end.usage.cached_tokens < end.usage.prompt_tokens


_shared = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def test_any_course_of_events() -> None:
    run_state_machine_as_test(
        SchedulerMachine, settings=settings(max_examples=400, stateful_step_count=40, derandomize=True, database=None, **_shared)
    )


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_any_course_of_events_at_length() -> None:
    run_state_machine_as_test(SchedulerMachine, settings=settings(max_examples=500, stateful_step_count=50, database=None, **_shared))
