"""The engine loop in this process, with the real scheduler, a scripted runner and a mailbox made of lists. All of it with one step after
the other, and with steps that are begun one ahead."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence

import pytest

from service.engine.drafting import Drafting, make_tables
from service.engine.engine import MAX_FAILURES, BrokenEngineError, Engine, Lane
from service.engine.messages import MAX_CHOICES, Abort, Delivery, Down, Event, Shutdown, Unreadable, Up
from service.engine.prompt_pace import PromptPace
from service.scheduling.budget import PromptLimit
from service.scheduling.plan import Drawn, KVGroup, RunnerCounts, StepPlan
from service.scheduling.scheduler import Scheduler
from tests.fakes import (
    DRAW_OUTSIDE,
    DRAW_TOO_FEW,
    FAIL_FORWARD,
    FAIL_SAMPLE,
    OUT_OF_MEMORY,
    VOCAB,
    ScriptedDrawing,
    ScriptedModel,
    ScriptedRunner,
    generate,
    scripted_model,
    scripted_token,
    scripted_tokens,
)

IS_AHEAD = False


@pytest.fixture(params=[False, True], ids=["one by one", "one ahead"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "IS_AHEAD", request.param)


class ListMailbox:
    """Gives out one list of messages per visit of the loop, and `Shutdown` once the engine would wait for ever. Every visit
    takes 10 ms of the test's clock, a wait its whole length, a look at the clock 1 ms."""

    def __init__(self, visits: Sequence[Sequence[Down | Unreadable]]) -> None:
        self.visits = list(visits)
        self.deliveries: list[Delivery] = []
        self.now = 0.0
        self.is_closed = False

    def receive(self, timeout_s: float | None) -> Sequence[Down | Unreadable]:
        self.now += max(timeout_s or 0, 0.01)
        if self.visits:
            return self.visits.pop(0)
        return [Shutdown()] if timeout_s is None else []

    def clock(self) -> float:
        self.now += 0.001
        return self.now

    def wait_for_room(self, timeout_s: float) -> bool:
        return True

    def wake(self) -> None:
        """It never waits."""

    def send(self, message: Up) -> None:
        assert isinstance(message, Delivery)
        self.deliveries.append(message)

    @property
    def events(self) -> list[Event]:
        return [event for delivery in self.deliveries for event in delivery.events]


def lane_of(
    model: ScriptedModel,
    *,
    max_sequences: int = 8,
    max_batch_tokens: int = 64,
    max_waiting_requests: int = 100,
    has_draft_model: bool = False,
) -> Lane:
    scheduler = Scheduler(
        num_blocks=model.info.num_kv_blocks,
        block_size=model.info.block_size,
        groups=model.groups,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        max_context=model.info.max_context,
        max_waiting_requests=max_waiting_requests,
        has_draft_model=has_draft_model,
    )
    return Lane(model.info, scheduler, model.runner, ahead=model.runner if IS_AHEAD else None)


def run(*visits: Sequence[Down | Unreadable], lanes: Sequence[Lane] = ()) -> ListMailbox:
    """Runs an engine until it is idle; every choice must then have ended exactly once and every block be back."""
    lanes = list(lanes) or [lane_of(scripted_model())]
    mailbox = ListMailbox(visits)
    Engine(lanes, mailbox, mailbox.clock).run()
    ends = defaultdict(int)
    for event in mailbox.events:
        assert ends[event.request_id, event.choice] == 0, "an event after the end"
        ends[event.request_id, event.choice] += event.finish is not None
        assert (event.usage is not None) == (event.finish is not None)
    assert set(ends.values()) <= {1}
    for lane in lanes:
        lane.scheduler.check()
        stats = lane.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    return mailbox


def tokens_of(mailbox: ListMailbox, request_id: str, choice: int = 0) -> list[int]:
    return [token for event in mailbox.events if (event.request_id, event.choice) == (request_id, choice) for token in event.tokens]


def end_of(mailbox: ListMailbox, request_id: str, choice: int = 0) -> Event:
    (end,) = [event for event in mailbox.events if (event.request_id, event.choice) == (request_id, choice) and event.finish]
    return end


def test_a_lane_tells_what_its_runner_counts() -> None:
    lane = lane_of(scripted_model())
    lane.counts = lambda: RunnerCounts(graph_replays=3, graph_misses=2, kernel_compiles=1)
    stats = run([generate("a", [5, 6, 7], max_tokens=2)], lanes=[lane]).deliveries[-1].stats[0]
    assert (stats.graph_replays, stats.graph_misses, stats.kernel_compiles) == (3, 2, 1)


def test_choices_draw_with_their_own_seeds() -> None:
    mailbox = run([generate("a", [5, 6, 7], n=3, seed=40, max_tokens=6)])
    for choice in range(3):
        assert tokens_of(mailbox, "a", choice) == scripted_tokens([5, 6, 7], 6, seed=40 + choice)
        end = end_of(mailbox, "a", choice)
        assert end.finish == "length"
        assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (3, 6)


def test_a_step_is_one_delivery_and_says_what_it_took() -> None:
    mailbox = run([generate("a", [1] * 20, max_tokens=3), generate("b", [2] * 10, max_tokens=3)])
    assert [delivery.step_tokens for delivery in mailbox.deliveries] == [30, 2, 2]
    assert [len(delivery.events) for delivery in mailbox.deliveries] == [2, 2, 2]
    assert all(delivery.step_s > 0 for delivery in mailbox.deliveries)
    last = mailbox.deliveries[-1].stats[0]
    assert (last.prompt_tokens, last.generation_tokens, last.steps) == (30, 6, 3)


def test_steps_are_begun_before_the_ids_of_those_in_front_are_known() -> None:
    lane = lane_of(scripted_model(num_blocks=5))
    mailbox = run([generate("a", [1] * 14, max_tokens=40), generate("b", [2] * 14, max_tokens=40)], lanes=[lane])
    assert isinstance(lane.runner, ScriptedRunner)
    assert lane.runner.num_ahead > 50 if IS_AHEAD else lane.runner.num_ahead == 0
    assert lane.stats().preemptions > 0
    for name, prompt in (("a", [1] * 14), ("b", [2] * 14)):
        assert tokens_of(mailbox, name) == scripted_tokens(prompt, 40)


class InOrder(ScriptedRunner):
    """Of a device on which every step takes 100 ms of the test's clock, whosever it is, and begins when the one before it ends."""

    def __init__(self, mailbox: ListMailbox, device: list[float]) -> None:
        super().__init__()
        self.mailbox, self.device = mailbox, device
        self.ends: dict[int, float] = {}

    def forward(self, plan: StepPlan) -> StepPlan:
        self.device[0] = self.ends[plan.step_id] = max(self.device[0], self.mailbox.now) + 0.1
        return super().forward(plan)

    def draw(self, handle: StepPlan, masks: None = None) -> ScriptedDrawing:
        drawing = Late(self, handle, masks)
        drawing.try_to_draw()
        return drawing


class Late(ScriptedDrawing):
    """Its ids are there when the device has come so far."""

    def wait(self) -> list[Drawn]:
        mailbox = self._runner.mailbox
        mailbox.now = max(mailbox.now, self._runner.ends[self._handle.step_id])
        return super().wait()


def test_a_step_is_not_charged_with_those_of_other_lanes() -> None:
    mailbox = ListMailbox([[generate(name, model=name, max_tokens=12) for name in ("one", "two", "three")]])
    device, lanes = [0.0], []
    for name in ("one", "two", "three"):
        lane = lane_of(scripted_model(name))
        lane.runner = lane.ahead = InOrder(mailbox, device)
        lanes.append(lane)
    Engine(lanes, mailbox, mailbox.clock).run()
    steps = [delivery.step_s for delivery in mailbox.deliveries if delivery.step_tokens == 1]
    assert len(steps) == 3 * 11
    assert max(steps) < 0.2
    assert sum(steps) / len(steps) == pytest.approx(0.1, abs=0.03)


def test_a_stop_id_ends_and_is_no_token() -> None:
    first, second = scripted_tokens([1, 2, 3], 2)
    mailbox = run([generate("a", stop_ids=(second,))])
    assert tokens_of(mailbox, "a") == [first]
    assert (end_of(mailbox, "a").finish, end_of(mailbox, "a").stop_id) == ("stop", second)


def test_logprobs_travel_beside_their_tokens() -> None:
    mailbox = run([generate("a", max_tokens=2, logprobs=2), generate("b", max_tokens=2)])
    with_logprobs = [event for event in mailbox.events if event.request_id == "a"]
    for event in with_logprobs:
        (token,), (logprob,) = event.tokens, event.logprobs
        assert (logprob.logprob, logprob.top) == (-0.5, [(token, -0.5), (token + 1, -1.5)])
    assert all(event.logprobs is None for event in mailbox.events if event.request_id == "b")


def test_two_models_are_served_side_by_side() -> None:
    lanes = [lane_of(scripted_model("one")), lane_of(scripted_model("two"))]
    mailbox = run([generate("a", [1], model="one", max_tokens=20), generate("b", [2], model="two", max_tokens=20)], lanes=lanes)
    assert tokens_of(mailbox, "a") == scripted_tokens([1], 20)
    assert tokens_of(mailbox, "b") == scripted_tokens([2], 20)
    order = [event.request_id for event in mailbox.events]
    assert order[:8] == ["a", "b"] * 4, "one lane had to wait for the other"


BAD = {
    "unknown model": (generate("bad", model="nobody"), 404),
    "empty prompt": (generate("bad", []), 400),
    "negative id": (generate("bad", [-1]), 400),
    "id past the vocabulary": (generate("bad", [VOCAB]), 400),
    "huge id": (generate("bad", [2**62]), 400),
    "no choices": (generate("bad", n=0), 400),
    "too many choices": (generate("bad", n=MAX_CHOICES + 1), 400),
    "endless choices": (generate("bad", n=10**12), 400),
    "nan temperature": (generate("bad", temperature=float("nan")), 400),
    "infinite penalty": (generate("bad", presence_penalty=float("inf")), 400),
    "stop id outside": (generate("bad", stop_ids=(VOCAB,)), 400),
    "bias outside": (generate("bad", logit_bias=((-1, 1.0),)), 400),
    "no tokens": (generate("bad", max_tokens=0), 400),
    "seed and choices overflow": (generate("bad", seed=2**63 - 1, n=2), 400),
    "nan timeout": (generate("bad", timeout_s=float("nan")), 400),
    "longer than the context": (generate("bad", [1] * 512), 400),
    "unreadable": (Unreadable("bad", 1, "prompt is a string"), 400),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_ends_alone(name: str) -> None:
    bad, status = BAD[name]
    mailbox = run([generate("a"), bad, generate("b", [4])])
    assert tokens_of(mailbox, "a") == scripted_tokens([1, 2, 3], 8)
    assert tokens_of(mailbox, "b") == scripted_tokens([4], 8)
    ends = [event for event in mailbox.events if event.request_id == "bad"]
    asked = bad.num_choices
    assert [end.choice for end in ends] == list(range(min(max(asked, 1), MAX_CHOICES)))
    for end in ends:
        assert (end.finish, end.error_status) == ("error", status)
        assert end.error


def test_a_fault_in_taking_in_ends_that_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lane = lane_of(scripted_model())
    add = lane.scheduler.add

    def add_or_fail(request, now):
        if request.request_id == "bad":
            raise KeyError("secret detail")
        add(request, now)

    monkeypatch.setattr(lane.scheduler, "add", add_or_fail)
    mailbox = run([generate("bad"), generate("a")], lanes=[lane])
    assert end_of(mailbox, "bad").error_status == 500
    assert "secret" not in end_of(mailbox, "bad").error
    assert end_of(mailbox, "a").finish == "length"


@pytest.mark.parametrize("trigger", [FAIL_FORWARD, FAIL_SAMPLE, OUT_OF_MEMORY, DRAW_TOO_FEW, DRAW_OUTSIDE])
def test_a_failed_step_ends_only_who_was_in_it(trigger: int, caplog: pytest.LogCaptureFixture) -> None:
    lanes = [lane_of(scripted_model("one"), max_sequences=1), lane_of(scripted_model("two"))]
    mailbox = run(
        [
            generate("bad", [1, trigger], model="one"),
            generate("waiting", [3], model="one"),
            generate("other", [4], model="two"),
        ],
        [],
        [],
        [generate("later", [5], model="one")],
        lanes=lanes,
    )
    end = end_of(mailbox, "bad")
    assert (end.finish, end.error_status) == ("error", 500)
    assert "told to" not in end.error, "the engine's own words reached a client"
    assert any(record.exc_info for record in caplog.records), "the trace is not in the log"
    for request_id, prompt in (("waiting", [3]), ("other", [4]), ("later", [5])):
        assert tokens_of(mailbox, request_id) == scripted_tokens(prompt, 8)
    assert all((delivery.step_tokens > 0) == (delivery.step_s > 0) for delivery in mailbox.deliveries), "a step that failed is counted"
    assert sum(delivery.step_model == "one" and delivery.step_tokens == 2 for delivery in mailbox.deliveries) == 0


def test_failures_without_end_break_the_engine() -> None:
    bad = [[generate(f"bad{i}", [FAIL_FORWARD])] for i in range(MAX_FAILURES)]
    with pytest.raises(BrokenEngineError):
        run(*bad)


def test_a_good_step_forgives_the_failed_ones() -> None:
    visits = [[generate(f"bad{i}", [FAIL_FORWARD])] for i in range(MAX_FAILURES - 1)]
    mailbox = run(*visits, [generate("good", max_tokens=1)], [], *[[generate(f"late{i}", [FAIL_FORWARD])] for i in range(MAX_FAILURES - 1)])
    assert end_of(mailbox, "good").finish == "length"


ABORTS: dict[str, Callable[[], ListMailbox]] = {
    "before it was planned": lambda: run([generate("a"), Abort("a")]),
    "while another has the only place": lambda: run(
        [generate("first", max_tokens=9), generate("a")], [], [Abort("a")], lanes=[lane_of(scripted_model(), max_sequences=1)]
    ),
    "half way through its prompt": lambda: run(
        [generate("a", range(200))], [], [Abort("a")], lanes=[lane_of(scripted_model(), max_batch_tokens=16)]
    ),
    "while it is decoding": lambda: run([generate("a", max_tokens=50)], [], [], [], [Abort("a")]),
    "twice": lambda: run([generate("a", max_tokens=50)], [], [], [], [Abort("a"), Abort("a")], [Abort("a")]),
}


@pytest.mark.parametrize("name", ABORTS)
def test_abort_in_every_state(name: str) -> None:
    end = end_of(ABORTS[name](), "a")
    assert end.finish == "abort"


def test_abort_of_the_finished_and_the_unknown_is_nothing() -> None:
    mailbox = run([Abort("nobody")], [generate("a", max_tokens=1)], [], [], [Abort("a")])
    assert [event.finish for event in mailbox.events] == ["length"]


def test_abort_of_one_choice_leaves_the_others() -> None:
    mailbox = run([generate("a", n=3, max_tokens=12)], [], [], [Abort("a", 1, finished=True)])
    assert [end_of(mailbox, "a", choice).finish for choice in range(3)] == ["length", "stop", "length"]
    assert tokens_of(mailbox, "a", 2) == scripted_tokens([1, 2, 3], 12, seed=2)


def test_a_preempted_request_can_be_aborted() -> None:
    lane = lane_of(scripted_model(num_blocks=5))
    requests = [generate(name, [i] * 14, max_tokens=40) for i, name in enumerate("ab")]
    visits: list[list[Down | Unreadable]] = [[*requests], *[[] for _ in range(60)]]
    undisturbed = run(*visits, lanes=[lane])
    assert undisturbed.deliveries[-1].stats[0].preemptions > 0, "the pool was too large to preempt"
    preempted_at = next(i for i, delivery in enumerate(undisturbed.deliveries) if delivery.stats[0].preemptions)
    visits[preempted_at + 1 + IS_AHEAD] = [Abort("b")]
    mailbox = run(*visits, lanes=[lane_of(scripted_model(num_blocks=5))])
    assert end_of(mailbox, "b").finish == "abort"
    assert end_of(mailbox, "b").usage.preemptions == 1
    assert tokens_of(mailbox, "a") == scripted_tokens([0] * 14, 40)


def test_deadlines_hold_while_waiting_and_while_running() -> None:
    lane = lane_of(scripted_model(), max_sequences=1)
    mailbox = run([generate("long", max_tokens=100, timeout_s=0.5), generate("queued", timeout_s=0.2), generate("free", [9])], lanes=[lane])
    assert end_of(mailbox, "queued").finish == "deadline"
    assert tokens_of(mailbox, "queued") == []
    assert end_of(mailbox, "long").finish == "deadline"
    assert 0 < len(tokens_of(mailbox, "long")) < 100
    assert end_of(mailbox, "free").finish == "length"


def test_overload_in_the_scheduler_is_an_end_too() -> None:
    lane = lane_of(scripted_model(), max_sequences=1, max_waiting_requests=1)
    mailbox = run([generate("a"), generate("b")], lanes=[lane])
    assert end_of(mailbox, "b").error_status == 429
    assert end_of(mailbox, "a").finish == "length"


def test_books_that_do_not_add_up_are_reported_and_nobody_dies(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    lane = lane_of(scripted_model())

    def broken() -> None:
        raise AssertionError("a block in two places")

    monkeypatch.setattr(lane.scheduler, "check", broken)
    mailbox = ListMailbox([[generate("a")]])
    engine = Engine([lane], mailbox, mailbox.clock)
    with caplog.at_level(logging.ERROR):
        engine.run()
    assert engine.num_failed_checks == 1
    assert "do not add up" in caplog.text
    assert end_of(mailbox, "a").finish == "length"


def test_a_request_with_neighbours_gets_what_it_gets_alone() -> None:
    requests = [generate(str(i), range(i, i + 5 + 3 * i), max_tokens=10 + i, seed=i) for i in range(8)]
    mailbox = run(*[[request] for request in requests])
    for i, request in enumerate(requests):
        assert tokens_of(mailbox, str(i)) == scripted_tokens(request.prompt, 10 + i, seed=i)


def test_the_script_depends_on_what_it_should() -> None:
    assert scripted_token(1, 2, 3) != scripted_token(2, 2, 3)
    assert scripted_token(1, 2, 3) != scripted_token(1, 3, 3)
    assert scripted_token(1, 2, 3) != scripted_token(1, 2, 4)


@pytest.mark.parametrize("fault", [None, FAIL_FORWARD, FAIL_SAMPLE])
def test_a_draft_model_that_fails_is_given_up_and_nothing_else_happens(fault: int | None) -> None:
    model = scripted_model()
    lane = lane_of(model, has_draft_model=True)
    draft = ScriptedRunner()
    lane.drafting = Drafting(
        draft, make_tables(64, 16, (KVGroup(),), has_prefix_cache=True), max_context=512, max_batch_tokens=64, clock=lambda: 0
    )
    lane.drafting.pace.target.learn(1, 1.0)
    prompt = [1, 2, 3] if fault is None else [1, fault, 3]
    if fault is not None:
        model.runner.forward = lambda plan: plan  # the model itself is well
        model.runner.sample = lambda plan, masks=None: [model.runner._draw(plan, sample) for sample in plan.samples]
    mailbox = run([generate("a", prompt, max_tokens=12, draft_len=4)], lanes=[lane])
    assert tokens_of(mailbox, "a") == scripted_tokens(prompt, 12)
    assert end_of(mailbox, "a").finish == "length"
    assert draft.steps
    assert (lane.drafting is None) == (fault is not None)
    guessed, right = mailbox.deliveries[-1].stats[0].drafts["model"]
    assert guessed == right, "it thinks as the model does"
    assert (guessed > 0) == (fault is None)


class FixedPace(PromptPace):
    """Ten tokens of prompts beside others, whatever was measured."""

    def __init__(self) -> None:
        super().__init__()
        self.num_decoding: list[int] = []
        self.learned: list[int] = []

    def next_limit(self, num_decoding: int) -> PromptLimit | None:
        self.num_decoding.append(num_decoding)
        return PromptLimit(10.0, (1.0,))

    def learn(self, plan: StepPlan, seconds: float) -> None:
        self.learned.append(plan.num_tokens)


def paced(name: str = "tiny") -> tuple[Lane, FixedPace]:
    lane, pace = lane_of(scripted_model(name)), FixedPace()
    lane.pace = pace
    return lane, pace


def test_a_prompt_alone_fills_its_steps_and_beside_others_it_is_cut() -> None:
    lane, pace = paced()
    mailbox = run([generate("a", [1] * 40, max_tokens=5)], [], [generate("b", [2] * 24, max_tokens=1)], lanes=[lane])
    assert [delivery.step_tokens for delivery in mailbox.deliveries] == [40, 1, 11, 11, 5]
    assert pace.num_decoding == [1, 1, 1, 1]
    assert pace.learned == [40, 1, 11, 11, 5]


def test_a_prompt_is_cut_for_those_who_wait_in_another_lane() -> None:
    lanes = [paced("one"), paced("two")]
    mailbox = run(
        [generate("a", [1], model="one", max_tokens=5)],
        [],
        [generate("b", [2] * 24, model="two", max_tokens=1)],
        lanes=[lane for lane, _ in lanes],
    )
    assert [delivery.step_tokens for delivery in mailbox.deliveries if delivery.step_model == "two"] == [10, 10, 4]
    assert lanes[1][1].num_decoding[-1] == 0


def test_a_failed_step_teaches_nothing_about_prompts() -> None:
    lane, pace = paced()
    run([generate("bad", [FAIL_FORWARD] * 20)], lanes=[lane])
    assert pace.learned == []
