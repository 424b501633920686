"""Steps that are planned before the ones in front of them are known: who is in them, what stands for the ids, and what ends meanwhile."""

from __future__ import annotations

import pytest

from service.scheduling.plan import PENDING, KVGroup
from service.scheduling.reading import Read
from service.scheduling.sequence import Request
from tests.scheduling.model import Bench, CountingGrammar, make_bench, make_request, solo


def begun(bench: Bench) -> tuple[object, object]:
    """The first step that draws, and the one behind it (or None), both begun."""
    plan = bench.plan()
    assert plan is not None
    bench.launch(plan)
    ahead = bench.plan(is_ahead=True)
    if ahead is not None:
        bench.launch(ahead)
    return plan, ahead


def finish(bench: Bench, request: Request, choice: int = 0) -> None:
    """To the end, one ahead throughout; then the ids must be the solo ones."""
    before = None
    for _ in range(500):
        plan = bench.plan(is_ahead=before is not None)
        if plan is not None:
            bench.launch(plan)
        if before is not None:
            bench.commit(before)
        before = plan
        if before is None and not bench.scheduler.has_work:
            break
    key = (request.request_id, choice)
    end = bench.ends[key]
    assert (bench.tokens.get(key, []), end.finish, end.stop_id) == solo(request, choice, request.sampling.max_tokens)


def test_the_id_that_is_being_drawn_is_pending() -> None:
    bench = make_bench()
    bench.add(request := make_request(prompt=(1, 2, 3), max_tokens=5))
    plan, ahead = begun(bench)
    assert [piece.tokens for piece in ahead.slices] == [(PENDING,)]
    assert (ahead.slices[0].start, ahead.samples[0].position, ahead.samples[0].num_generated) == (3, 4, 1)
    with pytest.raises(RuntimeError, match="not committed"):
        bench.scheduler.plan(0.0, is_ahead=True)
    with pytest.raises(RuntimeError, match="in front"):
        bench.scheduler.commit(ahead, bench.results[ahead.step_id][0], 0.0)
    bench.commit(plan)
    bench.commit(ahead)
    assert len(bench.tokens["a", 0]) == 2
    finish(bench, request)


def test_who_ends_with_the_id_in_flight_is_not_planned_again() -> None:
    bench = make_bench()
    bench.add(make_request("last", max_tokens=1))
    bench.add(make_request("more", max_tokens=5))
    plan, ahead = begun(bench)
    assert len(plan.samples) == 2
    assert len(ahead.slices) == 1
    bench.commit(plan)
    assert bench.ends["last", 0].finish == "length"


def test_who_ends_on_a_stop_id_leaves_a_row_that_counts_for_nothing() -> None:
    first = solo(make_request(max_tokens=1), 0, 1)[0][0]
    bench = make_bench()
    bench.add(request := make_request(max_tokens=5, stop_ids=(first,)))
    plan, ahead = begun(bench)
    bench.commit(plan)
    assert (bench.ends["a", 0].finish, bench.ends["a", 0].stop_id) == ("stop", first)
    assert bench.scheduler.stats.kv_blocks_used == 0
    bench.commit(ahead)
    assert bench.tokens == {}
    assert bench.scheduler.stats.generation_tokens == 1
    assert request.request_id in {key[0] for key in bench.ends}


def test_the_grammar_of_who_has_ended_is_asked_for_nothing_more() -> None:
    """A matcher that ended in an error would be asked for a mask, and its fault be logged as ours once more."""
    bench = make_bench()
    bench.add(make_request("ends", max_tokens=9, grammars=(CountingGrammar(1),)))
    bench.add(make_request("more", (7, 8), max_tokens=9, grammars=(more := CountingGrammar(9),)))
    plan, ahead = begun(bench)
    assert len(ahead.samples) == 2
    bench.commit(plan)
    assert bench.scheduler.grammars(ahead) == [None, more]


@pytest.mark.parametrize("kind", ["reads", "guesses", "is forced", "wants no id"])
def test_who_goes_on_from_what_the_step_brings_waits_for_it(kind: str) -> None:
    more = {
        "reads": {"read": Read(first=1)},
        "guesses": {"draft_len": 4, "prompt": (1, 2, 3, 1, 2, 3, 1, 2)},
        "is forced": {"grammars": (CountingGrammar(9, runs={1: (4, 5)}),)},
        "wants no id": {"read": Read(pool="last"), "max_tokens": 0},
    }[kind]
    bench = make_bench()
    bench.add(make_request("held", **more))
    bench.add(other := make_request("other", (7, 8), max_tokens=9))
    plan, ahead = begun(bench)
    names = {piece.sequence_id for piece in ahead.slices}
    assert names == {plan.slices[-1].sequence_id}
    bench.commit(plan)
    bench.commit(ahead)
    plan = bench.plan()
    assert len(plan.slices) == (1 if kind == "wants no id" else 2), "the hold outlived its step"
    bench.commit(plan)
    finish(bench, other)


def test_guesses_in_flight_hold_their_sequence() -> None:
    bench = make_bench()
    bench.add(request := make_request(prompt=(1, 2, 3) * 5, max_tokens=30, draft_len=4))
    bench.step()
    for _ in range(20):
        plan = bench.plan()
        bench.launch(plan)
        assert bench.plan(is_ahead=True) is None
        bench.commit(plan)
        if bench.runner.guessed:
            break
    assert bench.runner.guessed > 0
    finish(bench, request)


def test_a_long_prompt_goes_on_in_the_step_behind() -> None:
    bench = make_bench(max_batch_tokens=8)
    bench.add(request := make_request(prompt=tuple(range(9)) * 3, max_tokens=3))
    plan, ahead = begun(bench)
    assert (plan.slices[0].start, ahead.slices[0].start) == (0, 8)
    assert PENDING not in ahead.slices[0].tokens
    bench.commit(plan)
    bench.commit(ahead)
    finish(bench, request)


def test_nobody_loses_blocks_to_a_step_that_is_planned_ahead() -> None:
    bench = make_bench(num_blocks=6, block_size=2, groups=(KVGroup(),))
    bench.add(first := make_request("a", (1, 2, 3), max_tokens=8))
    bench.add(second := make_request("b", (4, 5, 6), max_tokens=8))
    plan = bench.plan()
    while bench.scheduler.has_work and bench.scheduler.stats.preemptions == 0:
        assert plan is not None
        bench.launch(plan)
        ahead = bench.plan(is_ahead=True)
        assert bench.scheduler.stats.preemptions == 0, "blocks were taken for a step ahead"
        if ahead is not None:
            bench.launch(ahead)
        bench.commit(plan)
        plan = ahead if ahead is not None else bench.plan()
    assert bench.scheduler.stats.preemptions == 1
    bench.commit(plan)
    finish(bench, first)
    finish(bench, second)


@pytest.mark.parametrize("which", [0, 1])
def test_a_failed_step_ends_who_is_in_it_and_the_other_stays_right(which: int) -> None:
    bench = make_bench()
    bench.add(make_request("a", max_tokens=9))
    plans = list(begun(bench))
    bench.add(other := make_request("late", (5, 6), max_tokens=9))
    outputs = bench.scheduler.fail(plans[which], 0.0)
    assert [(output.request_id, output.finish) for output in outputs] == [("a", "error")]
    bench.take(outputs)
    bench.scheduler.check()
    bench.commit(plans[1 - which])
    assert bench.scheduler.stats.kv_blocks_used == 0
    finish(bench, other)
