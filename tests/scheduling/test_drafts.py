"""Guesses change no id and cost nobody a place; right ones save steps."""

from __future__ import annotations

import pytest

from service.scheduling.drafts import JacobiDrafter, LookupDrafter, ModelDrafter
from service.scheduling.picture_grammar import PictureGrammar, PictureRule
from service.scheduling.plan import Drawn, StepPlan
from service.scheduling.sequence import Request
from service.vocabulary import PictureIds
from tests.scheduling.model import Bench, CountingGrammar, make_bench, make_request, solo

PICTURES = PictureIds(first_code=0, num_codes=11, rows=4, columns=5, begin_id=20, frame_id=21, end_id=22)


class Oracle:
    """Guesses what it was told, from a position on."""

    kind = "jacobi"

    def __init__(self, start: int, ids: list[int]) -> None:
        self.start, self.ids = start, ids

    def guess(self, tokens: list[int], count: int) -> list[int]:
        return self.ids[len(tokens) - self.start :][:count]

    def learn(self, position: int, drawn: list[int]) -> None:
        pass


def run(bench: Bench, ids: list[int] | None, *, draft_len: int, max_tokens: int = 20, **more: object) -> int:
    """Steps that a request took whose drafter guesses ids (its own guesses for None)."""
    request = make_request("a", (1, 2, 3), max_tokens, grammars=(CountingGrammar(max_tokens),), draft_len=draft_len, **more)
    bench.add(request)
    if ids is not None:
        gang = bench.scheduler._live["a"].gangs[0]
        gang.drafter = Oracle(3, ids)
    steps = bench.drain()
    assert bench.tokens["a", 0] == solo(make_request("a", (1, 2, 3), max_tokens, **more), 0, max_tokens)[0]
    return steps


def true_ids(**more: object) -> list[int]:
    return solo(make_request("a", (1, 2, 3), 20, **more), 0, 20)[0]


@pytest.mark.parametrize("draft_len", [1, 3, 7, 64])
def test_right_guesses_save_steps(draft_len: int) -> None:
    steps = run(make_bench(pictures=PICTURES), true_ids(), draft_len=draft_len)
    assert steps == -(-20 // (draft_len + 1))


def test_wrong_guesses_cost_no_step_and_no_id() -> None:
    wrong = [(token + 1) % 11 for token in true_ids()]
    bench = make_bench(pictures=PICTURES)
    assert run(bench, wrong, draft_len=4) == 20
    assert bench.runner.guessed > 0


def test_half_right() -> None:
    ids = true_ids()
    ids[5] = (ids[5] + 1) % 11
    assert run(make_bench(pictures=PICTURES), ids, draft_len=4) == 5  # 0-4, 5, 6-10, 11-15, 16-19


def test_guided_gangs_guess_in_both_rows() -> None:
    prompts = ((1, 2, 3), (4,))
    want = solo(make_request("a", prompts=prompts, max_tokens=20), 0, 20)[0]
    bench = make_bench(pictures=PICTURES)
    bench.add(make_request("a", prompts=prompts, max_tokens=20, guidance=2.0, grammars=(CountingGrammar(20),), draft_len=4))
    bench.scheduler._live["a"].gangs[0].drafter = Oracle(3, want)
    assert bench.drain() == 4
    assert bench.tokens["a", 0] == want


def test_what_is_left_of_a_step_is_all_that_guesses_get() -> None:
    """Budget and rows go to those who draw and to prompts first."""
    bench = make_bench(pictures=PICTURES, max_batch_tokens=4, num_blocks=64)
    bench.add(make_request("a", (1, 2, 3), 20, grammars=(CountingGrammar(20),), draft_len=16))
    for name in "bc":
        bench.add(make_request(name, range(9), 6))
    sizes = []
    while bench.scheduler.has_work:
        plan = bench.step()
        assert plan is not None
        sizes.append(plan.num_tokens)
    assert max(sizes) <= 4
    assert bench.tokens["a", 0] == true_ids()


def test_without_rows_nobody_is_preempted_for_a_guess() -> None:
    bench = make_bench(pictures=PICTURES, num_blocks=7, block_size=4)
    bench.add(make_request("a", (1, 2, 3), 17, grammars=(CountingGrammar(17),), draft_len=64))
    bench.add(make_request("b", (1, 2, 4), 4))
    bench.drain()
    assert bench.scheduler.stats.preemptions == 0


@pytest.mark.parametrize("more", [{"presence_penalty": 1.0}, {"draft_len": 0}])
def test_penalties_and_no_wish_mean_no_guess(more: dict[str, float]) -> None:
    bench = make_bench(pictures=PICTURES)
    bench.add(make_request("a", (1, 2, 3), 20, grammars=(CountingGrammar(20),), **{"draft_len": 4, **more}))
    bench.drain()
    assert bench.runner.guessed == 0


def test_a_stop_id_among_right_guesses_ends_there() -> None:
    ids = true_ids()
    stop = ids[4]
    request = make_request("a", (1, 2, 3), 20, stop_ids=(stop,), grammars=(CountingGrammar(20),), draft_len=16)
    bench = make_bench(pictures=PICTURES)
    bench.add(request)
    bench.scheduler._live["a"].gangs[0].drafter = Oracle(3, ids)
    bench.drain()
    assert bench.tokens["a", 0] == ids[: ids.index(stop)]
    assert bench.ends["a", 0].stop_id == stop
    assert bench.scheduler.stats.kv_blocks_used == 0


def test_aborted_while_guesses_are_in_flight() -> None:
    bench = make_bench(pictures=PICTURES)
    bench.add(make_request("a", (1, 2, 3), 20, grammars=(CountingGrammar(20),), draft_len=8))
    bench.add(make_request("b", (1, 2, 3), 20))
    bench.step()
    plan: StepPlan | None = bench.plan()
    assert plan is not None
    assert len(plan.samples) > len(plan.slices)
    bench.take(bench.scheduler.abort("a", None, "abort", bench.now))
    bench.commit(plan)
    bench.drain()
    assert bench.tokens["b", 0] == true_ids()


def test_samples_say_where_they_stand() -> None:
    bench = make_bench(pictures=PICTURES)
    bench.add(make_request("a", (1, 2, 3), 20, grammars=(CountingGrammar(20),), draft_len=2))
    plan = bench.plan()
    assert plan is not None
    assert [(sample.position, sample.num_generated, sample.back) for sample in plan.samples] == [(3, 0, 2), (4, 1, 1), (5, 2, 0)]
    wrong = Drawn((plan.slices[0].tokens[3] + 1) % 11)
    outputs = bench.scheduler.commit(plan, [wrong, Drawn(1), Drawn(2)], 0.0)
    assert [output.token for output in outputs] == [wrong.token]


def test_jacobi_guesses_what_was_drawn_there_then_the_code_above() -> None:
    drafter = JacobiDrafter(PICTURES)
    row = [3, 4, 5, 6, 7]
    assert drafter.guess([20, *row], 6) == [*row, 3]
    drafter.learn(6, [8, 9])
    assert drafter.guess([20, *row], 3) == [8, 9, 5]
    assert drafter.guess([20, *row, 8], 2) == [9, 5]
    assert JacobiDrafter(PICTURES).guess([20], 2) == [0, 0], "a first guess is a code, whatever stands before"


def test_jacobi_in_a_picture_ends_with_it() -> None:
    """No guess reaches beyond the codes that are drawn in one run."""
    grammar = PictureGrammar(PICTURES, PictureRule(2), 100)
    bench = make_bench(pictures=PICTURES, max_batch_tokens=64, max_context=100)
    bench.add(make_request("a", (1, 20), 60, grammars=(grammar,), draft_len=64))
    bench.drain()
    tokens = bench.tokens["a", 0]
    assert len(tokens) == 41
    assert [index for index, token in enumerate(tokens) if token == 21] == [20]
    assert bench.ends["a", 0].finish == "stop"


def test_many_together_guess_nothing() -> None:
    bench = make_bench(pictures=PICTURES, max_drafting=2)
    for name in "abc":
        bench.add(make_request(name, (1, 2, 3), 20, grammars=(CountingGrammar(20),), draft_len=8, seed=ord(name)))
    for _ in range(5):
        bench.step()
    assert bench.runner.guessed == 0
    bench.take(bench.scheduler.abort("c", None, "abort", bench.now))
    bench.step()
    assert bench.runner.guessed > 0


# -- prompt lookup --


def test_lookup_guesses_what_followed_last_time() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    drafter = LookupDrafter()
    assert drafter.guess([*text, 9, 1, 2, 3], 3) == [4, 5, 6]
    assert LookupDrafter().guess([*text, 9, 1, 2], 3) == [], "two ids alone say little to one who has not been right"
    assert LookupDrafter().guess([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 1) == [5], "the newest place"
    assert LookupDrafter().guess([0, 1, 2, 3, 4, 9, 1, 2, 3, 5, 0, 1, 2, 3], 1) == [4], "the longest run before the newest place"
    assert LookupDrafter().guess([1, 2, 3], 4) == []


def test_lookup_never_finds_the_run_itself() -> None:
    drafter = LookupDrafter()
    tokens = [5, 6, 7, 8]
    for _ in range(20):
        assert drafter.guess(tokens, 4) == []
        tokens.append(tokens[-1] + 1)


def test_lookup_guesses_longer_while_it_is_right() -> None:
    text = list(range(10, 60))
    drafter, tokens, lengths = LookupDrafter(), [*range(10, 60), 0, 10, 11, 12], []
    while len(tokens) < 51 + 40:
        guess = drafter.guess(tokens, 16)
        drawn = text[len(tokens) - 51 :][: len(guess) + 1]
        drafter.learn(len(tokens), drawn)
        lengths.append(len(guess))
        tokens += drawn
    assert lengths == [4, 8, 16, 16]


def test_lookup_gives_up_what_is_always_wrong() -> None:
    drafter, tokens, num_guesses = LookupDrafter(), [1, 2, 3, 4] * 3, 0
    for step in range(200):
        guess = drafter.guess(tokens, 4)
        num_guesses += bool(guess)
        drawn = 20 + step  # never what was guessed
        drafter.learn(len(tokens), [drawn])
        tokens += [drawn, 1, 2, 3]
    assert 3 < num_guesses < 14


def test_text_is_guessed_and_stays_the_same() -> None:
    """The fake model never repeats itself on purpose, so most guesses are wrong; a prompt that it will repeat makes them right."""
    want = solo(make_request("a", (1, 2, 3), 20), 0, 20)[0]
    # The answer stands in the prompt, behind the beginning that the prompt ends with.
    prompt = (1, 2, 3)
    bench = make_bench()
    bench.add(make_request("a", prompt, 20, draft_len=8))
    gang = bench.scheduler._live["a"].gangs[0]
    assert isinstance(gang.drafter, LookupDrafter)
    inner = LookupDrafter()
    before = [1, 2, 3, *want, 0]

    class Informed:
        """Looks up in a text that has the answer in it."""

        kind = "lookup"

        def guess(self, tokens: list[int], count: int) -> list[int]:
            return inner.guess([*before, *tokens], count)

        def learn(self, position: int, drawn: list[int]) -> None:
            inner.learn(position + len(before), drawn)

    gang.drafter = Informed()
    steps = bench.drain()
    assert bench.tokens["a", 0] == want
    assert steps < 12


# -- a draft model --


def drafted(bench: Bench, name: str = "a") -> int:
    """The sequence of a request's first choice."""
    return bench.scheduler._live[name].gangs[0].sequences[0].sequence_id


def started(*requests: Request, **more: object) -> Bench:
    """A bench whose requests have their first id."""
    bench = make_bench(has_draft_model=True, **more)
    for request in requests:
        bench.add(request)
    bench.step()
    return bench


def test_a_wish_says_what_is_known_and_how_much_there_is_room_for() -> None:
    bench = started(make_request("a", (1, 2, 3), 6, draft_len=16, seed=5))
    wishes = bench.scheduler.draft_wishes()
    (wish,) = wishes.wanted
    assert (wish.sequence_id, wish.params.seed, wish.num_generated, wish.tokens_left) == (drafted(bench), 5, 1, 5)
    assert list(wish.tokens) == [1, 2, 3, *bench.tokens["a", 0]]
    assert wish.most == 4, "the last id needs no guess behind it"
    assert (wishes.num_running, wishes.kept) == (1, {wish.sequence_id})


def test_guesses_of_a_draft_model_save_steps_and_are_counted() -> None:
    ids = true_ids()
    bench = started(make_request("a", (1, 2, 3), 20, draft_len=4))
    steps = 0
    while bench.scheduler.has_work:
        bench.scheduler.draft_wishes()
        done = len(bench.tokens["a", 0])
        guess = ids[done : done + 4] if steps % 2 else [(ids[done] + 1) % 11]
        plan, _ = bench.scheduler.plan(0.0, {drafted(bench): guess})
        assert plan is not None
        bench.commit(plan)
        steps += 1
    assert bench.tokens["a", 0] == ids
    assert steps < 10
    guessed, right = bench.scheduler.stats.drafts["model"]
    assert right < guessed
    assert 1 + steps + right + bench.scheduler.stats.drafts["lookup"][1] == 20


@pytest.mark.parametrize(
    "more",
    [
        {"presence_penalty": 1.0},
        {"draft_len": 0},
        {"prompts": ((1, 2, 3), (4,)), "guidance": 2.0},
        {"grammars": (CountingGrammar(20, runs={2: (7,)}),)},
    ],
    ids=["penalties", "no wish", "guided", "no room in the grammar"],
)
def test_nothing_is_wished_for(more: dict[str, object]) -> None:
    bench = started(make_request("a", **{"prompt": (1, 2, 3), "max_tokens": 20, "draft_len": 4, **more}))
    assert bench.scheduler.draft_wishes().wanted == ()


def test_nothing_is_wished_for_a_prompt_that_is_under_way() -> None:
    bench = started(make_request("a", tuple(range(10)) * 4, 20, draft_len=4), max_batch_tokens=16)
    assert bench.scheduler.draft_wishes().wanted == ()


def test_prompt_lookup_goes_first() -> None:
    bench = started(make_request("a", (1, 2, 3), 20, draft_len=4))
    tokens = bench.scheduler._live["a"].gangs[0].sequences[0].tokens
    assert ModelDrafter().wants(tokens, 4)
    drafter = ModelDrafter()
    text = [1, 2, 3, 4, 5, 1, 2, 3]
    assert not drafter.wants(text, 2)
    drafter.offer([9, 9])
    assert (drafter.guess(text, 2), drafter.kind) == ([4, 5], "lookup")
    drafter.learn(len(text), [9])
    assert drafter.wants([*text, 9], 2)
    drafter.offer([7, 8, 9])
    assert (drafter.guess([*text, 9], 2), drafter.kind) == ([7, 8], "model")


def test_many_or_some_that_wait_wish_for_nothing() -> None:
    requests = [make_request(name, (1, 2, ord(name) % 11), 20, draft_len=4) for name in "abc"]
    assert started(*requests, max_drafting=2).scheduler.draft_wishes().wanted == ()
    bench = started(*requests[:2], max_drafting=2)
    assert len(bench.scheduler.draft_wishes().wanted) == 2
    bench.add(requests[2])
    wishes = bench.scheduler.draft_wishes()
    assert (wishes.wanted, len(wishes.kept)) == ((), 2)


def test_what_is_not_running_is_not_kept() -> None:
    bench = started(make_request("a", (1, 2, 3), 20, draft_len=4), make_request("b", (4, 5), 20, draft_len=4))
    kept = {drafted(bench)}
    bench.take(bench.scheduler.abort("b", None, "abort", bench.now))
    assert bench.scheduler.draft_wishes().kept == kept
