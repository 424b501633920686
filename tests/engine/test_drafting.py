"""A draft model changes no id, saves steps where it is right, costs next to nothing where it is not, and its blocks come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest

from service.engine.drafting import Drafting, make_tables
from service.scheduling.plan import Drawn, KVGroup, StepPlan
from tests.scheduling.model import VOCAB, Bench, FakeRunner, fold, make_bench, make_request, solo

Spoil = Callable[[int, int], bool]


@dataclass
class Draft:
    """The fake model as a draft model: it looks before it trusts its blocks. spoils: which ids (position, id) it gets wrong. known: the
    tokens of a sequence that are no guess."""

    model: FakeRunner
    tick: Callable[[StepPlan], None]
    known: Callable[[int], Sequence[int]]
    spoils: Spoil = lambda position, token: False
    plans: list[StepPlan] = field(default_factory=list)

    def forward(self, plan: StepPlan) -> StepPlan:
        self.plans.append(plan)
        self.tick(plan)
        for piece in plan.slices:
            known, last = self.known(piece.sequence_id), piece.start - 1
            if 0 <= last < len(known):
                place = piece.tables[0][last // self.model.block_size], last % self.model.block_size
                assert self.model.places[place][3] == fold(known[: piece.start]), "a wrong guess is taken for read"
        return plan

    def sample(self, handle: StepPlan, masks: None = None) -> list[Drawn]:
        drawn = self.model.run(handle)
        pairs = zip(handle.samples, drawn, strict=True)
        return [Drawn((one.token + 1) % VOCAB) if self.spoils(sample.position, one.token) else one for sample, one in pairs]


@dataclass
class Pair:
    """A lane of the scheduler's fake model and its draft model, with a clock that their steps move on."""

    bench: Bench
    drafting: Drafting
    draft: Draft
    costs: tuple[float, float]
    now: float = 0.0
    num_steps: int = 0

    def step(self) -> None:
        guesses = self.drafting.guess(self.bench.scheduler.draft_wishes())
        self.drafting.check()
        plan, outputs = self.bench.scheduler.plan(self.now, guesses)
        self.bench.take(outputs)
        if plan is not None:
            self.now += self.costs[0] * (1 + 0.02 * plan.num_tokens)
            self.num_steps += 1
            self.bench.commit(plan)
            self.drafting.learn(plan)

    def drain(self) -> Pair:
        while self.bench.scheduler.has_work:
            self.step()
        self.drafting.guess(self.bench.scheduler.draft_wishes())
        assert self.drafting.num_blocks_used == 0
        return self


def make_pair(
    spoils: Spoil = lambda position, token: False,
    *,
    costs: tuple[float, float] = (1.0, 0.1),
    num_draft_blocks: int = 256,
    groups: tuple[KVGroup, ...] = (KVGroup(),),
    max_context: int = 256,
    has_prefix_cache: bool = True,
    **more: object,
) -> Pair:
    """costs: seconds of a step of the model, and of the draft model."""
    bench = make_bench(**{"has_draft_model": True, "num_blocks": 256, "max_context": 256, "has_prefix_cache": has_prefix_cache, **more})
    draft = Draft(FakeRunner(groups, 4, 32, 16), lambda plan: None, lambda sequence_id: tokens_of(bench, sequence_id), spoils)
    drafting = Drafting(
        draft,
        make_tables(num_draft_blocks, 4, groups, has_prefix_cache=has_prefix_cache),
        max_context=max_context,
        max_batch_tokens=32,
        clock=lambda: pair.now,
    )
    pair = Pair(bench, drafting, draft, costs)
    draft.tick = partial(spend, pair)
    return pair


def tokens_of(bench: Bench, sequence_id: int) -> Sequence[int]:
    gangs = (gang for live in bench.scheduler._live.values() for gang in live.gangs.values())
    return next(gang.sequences[0].tokens for gang in gangs if gang.sequences[0].sequence_id == sequence_id)


def spend(pair: Pair, plan: StepPlan) -> None:
    pair.now += pair.costs[1] * (1 + 0.02 * plan.num_tokens)


def run(pair: Pair, *requests: object) -> Pair:
    """All requests at once; each must get what it gets alone, whatever is guessed."""
    for request in requests:
        pair.bench.add(request)
    pair.drain()
    for request in requests:
        for choice in range(request.num_choices):
            tokens, finish, stop_id = solo(request, choice, request.sampling.max_tokens)
            assert pair.bench.tokens.get((request.request_id, choice), []) == tokens
            end = pair.bench.ends[request.request_id, choice]
            assert (end.finish, end.stop_id) == (finish, stop_id)
    return pair


def story(name: str = "a", max_tokens: int = 200, *, prompt: Sequence[int] = (1, 2, 3), **more: object) -> object:
    return make_request(name, prompt, max_tokens, draft_len=8, seed=ord(name), **more)


def model_drafts(pair: Pair) -> tuple[int, int]:
    return pair.bench.scheduler.stats.drafts["model"]


def seconds(pair: Pair, *requests: object) -> float:
    return run(pair, *requests).now


def plain_seconds(*requests: object, **more: object) -> float:
    """Without a draft model, but with prompt lookup."""
    pair = make_pair(**more)
    pair.drafting.pace.purse = float("-inf")
    took = seconds(pair, *requests)
    assert model_drafts(pair) == (0, 0)
    return took


def test_the_model_itself_as_its_draft_is_always_right() -> None:
    pair = run(make_pair(), story())
    guessed, right = model_drafts(pair)
    assert guessed == right > 120
    assert pair.num_steps < 40
    assert pair.now < 0.5 * plain_seconds(story())


@pytest.mark.parametrize("every", [2, 3, 5])
def test_sometimes_wrong(every: int) -> None:
    """Positions that are multiples of `every` are guessed wrong: the draft model's blocks are mended behind each."""
    pair = run(make_pair(lambda position, token: position % every == 0), story())
    guessed, right = model_drafts(pair)
    assert 0 < right < guessed
    assert pair.now < plain_seconds(story())


def test_always_wrong_is_given_up() -> None:
    pair = make_pair(lambda position, token: True, costs=(1.0, 0.3))
    requests = [story(name) for name in "abcdefgh"]
    took = sum(seconds_of_next(pair, request) for request in requests)
    plain = make_pair(costs=(1.0, 0.3))
    plain.drafting.pace.purse = float("-inf")
    least = sum(seconds_of_next(plain, request) for request in requests)
    assert took < least * 1.02
    assert model_drafts(pair)[1] == 0
    before = model_drafts(pair)[0]
    seconds_of_next(pair, story("z"))
    assert model_drafts(pair)[0] - before < 12, "probes alone are left"


def seconds_of_next(pair: Pair, request: object) -> float:
    before = pair.now
    run(pair, request)
    return pair.now - before


@pytest.mark.parametrize("cost", [0.9, 1.5])
def test_a_draft_model_that_is_too_slow_is_given_up(cost: float) -> None:
    """Right every time, and still no gain."""
    pair = make_pair(costs=(1.0, cost))
    requests = [story(name) for name in "abcdefgh"]
    took = sum(seconds_of_next(pair, request) for request in requests)
    assert took < 1.03 * sum(plain_seconds(request) for request in requests)


def test_one_that_becomes_right_is_found_out() -> None:
    """A text that is easy to guess after many that were not."""
    is_wrong = True
    pair = make_pair(lambda position, token: is_wrong)
    for name in "abcd":
        run(pair, story(name))
    is_wrong = False
    for name in "efgh":
        run(pair, story(name))
    assert seconds_of_next(pair, story("i")) < 0.6 * plain_seconds(story("i"))


@pytest.mark.parametrize(
    "requests",
    {
        "several": [story("a"), story("b", prompt=range(9)), story("c", 50, prompt=(5,) * 30)],
        "choices": [story("a", num_choices=4)],
        "stop ids": [story("a", stop_ids=(3,)), story("b", stop_ids=(4,), min_tokens=30)],
        "logprobs": [story("a", logprobs=2)],
        "short": [story("a", 1), story("b", 2), story("c", 3)],
        "with one that can't be guessed": [story("a"), make_request("b", (4, 5), 60, presence_penalty=1.0)],
    }.values(),
    ids=lambda requests: None,
)
@pytest.mark.parametrize("every", [1, 3, 1000])
def test_ids_stay_the_same(requests: list[object], every: int) -> None:
    run(make_pair(lambda position, token: position % every == every - 1), *requests)


def test_together_they_share_the_draft_models_steps() -> None:
    pair = run(make_pair(), story("a"), story("b", prompt=(7, 8)))
    assert any(len(plan.slices) == 2 and plan.num_tokens == 2 for plan in pair.draft.plans)
    assert pair.now < 0.6 * plain_seconds(story("a"), story("b", prompt=(7, 8)))


def test_preempted_ones_give_their_blocks_back_and_go_on() -> None:
    requests = [story(name, 60, prompt=(ord(name) % 11,) * 9) for name in "abcd"]
    pair = run(make_pair(num_blocks=36), *requests)
    assert pair.bench.scheduler.stats.preemptions > 0
    assert model_drafts(pair)[1] > 0


def test_few_blocks_of_the_draft_model_mean_fewer_guesses() -> None:
    pair = run(make_pair(num_draft_blocks=10), story("a", 60), story("b", 60))
    assert model_drafts(pair)[1] > 0
    assert model_drafts(run(make_pair(num_draft_blocks=1), story())) == (0, 0)


def test_the_context_of_the_draft_model_ends_guessing() -> None:
    pair = run(make_pair(max_context=50), story())
    assert max(piece.start + len(piece.tokens) for plan in pair.draft.plans for piece in plan.slices) <= 50
    assert model_drafts(pair)[1] > 20


def test_windows_keep_what_a_mended_text_still_sees() -> None:
    groups = (KVGroup(), KVGroup(window=6, sink=2))
    pair = run(make_pair(lambda position, token: position % 4 == 0, groups=groups), story())
    assert model_drafts(pair)[1] > 0


def test_equal_beginnings_are_read_once() -> None:
    prompt = [(7 * index) % 11 for index in range(30)]
    for has_prefix_cache, most in ((True, 2), (False, 30)):
        pair = make_pair(has_prefix_cache=has_prefix_cache)
        run(pair, story("a", prompt=prompt))
        before = len(pair.draft.plans)
        run(pair, story("b", prompt=prompt))
        assert pair.draft.plans[before].num_tokens <= most + 4
        assert has_prefix_cache or pair.draft.plans[before].num_tokens >= 30


def test_a_long_text_is_read_in_chunks_beside_short_ones() -> None:
    pair = make_pair(max_batch_tokens=128)
    long = story("b", 100, prompt=[(3 * index) % 11 for index in range(100)])
    run(pair, story("a"), long)
    sizes = [max(len(piece.tokens) for piece in plan.slices) for plan in pair.draft.plans]
    assert max(plan.num_tokens for plan in pair.draft.plans) <= 32
    assert sorted(sizes)[-2] >= 20


def test_a_text_beyond_some_chunks_is_left_alone_while_others_run() -> None:
    prompt = [(3 * index) % 11 for index in range(140)]
    pair = make_pair(max_batch_tokens=256)
    pair.bench.add(story("a", 30))
    pair.bench.add(story("b", 30, prompt=prompt))
    while ("a", 0) not in pair.bench.ends:
        pair.step()
    assert all(len(piece.tokens) < 32 for plan in pair.draft.plans for piece in plan.slices)


def test_aborted_in_the_middle() -> None:
    pair = make_pair()
    pair.bench.add(story("a"))
    pair.bench.add(story("b", 60))
    for _ in range(12):
        pair.step()
    pair.bench.take(pair.bench.scheduler.abort("a", None, "stop", pair.now))
    pair.drain()
    assert pair.bench.tokens["b", 0] == solo(story("b", 60), 0, 60)[0]
    given = pair.bench.tokens["a", 0]
    assert given == solo(story("a"), 0, 200)[0][: len(given)]


def test_many_at_once_are_not_guessed_for() -> None:
    pair = run(make_pair(max_drafting=4), *[story(name, 40) for name in "abcdefgh"])
    alone = max(len(plan.slices) for plan in pair.draft.plans) if pair.draft.plans else 0
    assert alone <= 4
