"""One rule a test: order, budget, preemption, gangs, pictures, ends, refusals, numbers."""

from __future__ import annotations

import statistics
import time

import pytest

from service.errors import ContextLengthError, OverloadedError, RequestError
from service.scheduling.plan import Drawn, KVGroup
from tests.scheduling.model import VOCAB, Bench, make_bench, make_request, solo


def finish_of(bench: Bench, request_id: str, choice: int = 0) -> str | None:
    return bench.ends[request_id, choice].finish


# -- a step --


def test_decodes_come_first_and_prefill_fills_the_budget() -> None:
    bench = make_bench(max_batch_tokens=8)
    bench.add(make_request("a", (1, 2, 3), max_tokens=9))
    bench.step()
    bench.add(make_request("b", range(20)))
    plan = bench.plan()
    assert plan is not None
    assert [len(piece.tokens) for piece in plan.slices] == [1, 7]
    assert [sample.slice_indexes for sample in plan.samples] == [(0,)]
    bench.commit(plan)
    plan = bench.plan()
    assert plan is not None
    assert (plan.slices[1].start, plan.slices[1].tokens) == (7, tuple(range(7, 14)))
    bench.commit(plan)
    bench.drain()


def test_one_prompt_in_chunks_equals_one_prompt_at_once() -> None:
    outputs = []
    for budget in (1, 2, 5, 64):
        bench = make_bench(max_batch_tokens=budget)
        bench.add(make_request("a", range(23), max_tokens=12))
        bench.drain()
        outputs.append(bench.tokens["a", 0])
    assert outputs == [outputs[0]] * 4
    assert len(outputs[0]) == 12


def test_a_last_chunk_of_one_token_stands_among_the_decodes() -> None:
    bench = make_bench(max_batch_tokens=8)
    bench.add(make_request("a", range(9), max_tokens=3))
    bench.step()
    bench.add(make_request("b", range(30, 35)))
    plan = bench.step()
    assert plan is not None
    assert [len(piece.tokens) for piece in plan.slices] == [1, 5]
    bench.drain()


def test_never_more_sequences_than_allowed() -> None:
    bench = make_bench(max_sequences=3)
    for index in range(7):
        bench.add(make_request(str(index), (index, index), max_tokens=5))
    bench.step()
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (3, 4)
    bench.drain()


def test_priority_first_then_arrival() -> None:
    bench = make_bench(max_sequences=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 0), ("d", -5)):
        bench.add(make_request(name, (ord(name),), max_tokens=1, priority=priority))
    bench.drain()
    assert [key[0] for key in bench.ends] == ["d", "b", "c", "a"]


def test_plan_and_commit_alternate() -> None:
    bench = make_bench()
    bench.add(make_request())
    plan = bench.plan()
    assert plan is not None
    with pytest.raises(RuntimeError, match="not committed"):
        bench.scheduler.plan(0.0)
    with pytest.raises(ValueError, match="2 ids were drawn for 1"):
        bench.scheduler.commit(plan, [Drawn(1), Drawn(2)], 0.0)
    bench.commit(plan)
    with pytest.raises(RuntimeError, match="not in flight"):
        bench.scheduler.commit(plan, [Drawn(1)], 0.0)
    with pytest.raises(RuntimeError, match="not in flight"):
        bench.scheduler.fail(plan, 0.0)


def test_nothing_to_do_is_no_plan() -> None:
    assert make_bench().scheduler.plan(0.0) == (None, [])


def test_released_sequences_are_told_once() -> None:
    bench = make_bench()
    bench.add(make_request("a", max_tokens=1))
    first = bench.step()
    bench.add(make_request("b", (7,), max_tokens=2))
    second, third = bench.step(), bench.step()
    assert first is not None
    assert second is not None
    assert third is not None
    assert second.released == (first.slices[0].sequence_id,)
    assert third.released == ()


# -- drawing --


def test_a_stop_id_ends_and_is_no_text() -> None:
    request = make_request(max_tokens=60, stop_ids=(3, 5))
    bench = make_bench()
    bench.add(request)
    bench.drain()
    tokens, finish, stop_id = solo(request, 0, 60)
    end = bench.ends["a", 0]
    assert finish == "stop"
    assert (bench.tokens.get(("a", 0), []), end.finish, end.stop_id, end.token, end.drawn) == (tokens, "stop", stop_id, None, None)
    assert end.usage is not None
    assert end.usage.completion_tokens == len(tokens) + 1


def test_no_stop_id_before_min_tokens() -> None:
    bench = make_bench()
    stop_ids = tuple(range(1, VOCAB))
    bench.add(make_request(max_tokens=9, stop_ids=stop_ids, min_tokens=3))
    banned = []
    while bench.scheduler.has_work:
        plan = bench.step()
        assert plan is not None
        banned.append(plan.samples[0].banned)
    assert banned[:4] == [stop_ids, stop_ids, stop_ids, ()]
    assert bench.tokens["a", 0][:3] == [0, 0, 0]


def test_length_ends_at_max_tokens_or_at_the_context() -> None:
    bench = make_bench(max_context=10)
    bench.add(make_request("a", range(4), max_tokens=3))
    bench.add(make_request("b", range(20, 24), max_tokens=99))
    bench.drain()
    assert [(len(bench.tokens[name, 0]), finish_of(bench, name)) for name in "ab"] == [(3, "length"), (6, "length")]
    assert bench.ends["b", 0].token == bench.tokens["b", 0][-1], "the last token comes with the end"


def test_history_only_with_penalties() -> None:
    bench = make_bench()
    bench.add(make_request("a", (1, 2), max_tokens=3))
    bench.add(make_request("b", (3, 4), max_tokens=3, presence_penalty=0.5))
    bench.step()
    plan = bench.step()
    assert plan is not None
    assert [sample.history for sample in plan.samples] == [None, (3, 4, bench.tokens["b", 0][0])]
    assert plan.samples[1].prompt_len == 2


def test_choices_draw_with_seeds_of_their_own_and_equal_their_solo_runs() -> None:
    request = make_request("a", range(9), max_tokens=6, num_choices=3, seed=40)
    bench = make_bench()
    bench.add(request)
    bench.drain()
    for choice in range(3):
        assert bench.tokens["a", choice] == solo(request, choice, 6)[0]


# -- gangs --


def test_a_gang_of_two_draws_one_id_from_both() -> None:
    request = make_request("a", prompts=(tuple(range(11)), (5, 6)), max_tokens=7, guidance=4.0)
    bench = make_bench(max_batch_tokens=5)
    bench.add(request)
    plans = []
    while bench.scheduler.has_work:
        plans.append(bench.step())
    sampled = [plan for plan in plans if plan is not None and plan.samples]
    assert len(sampled) == 7
    for plan in sampled:
        (sample,) = plan.samples
        conditional, unconditional = (plan.slices[index] for index in sample.slice_indexes)
        assert conditional.start > unconditional.start
        assert conditional.tokens[-1:] == unconditional.tokens[-1:] or plan is sampled[0]
        assert sample.guidance == 4.0
    assert bench.tokens["a", 0] == solo(request, 0, 7)[0]


@pytest.mark.parametrize("lengths", [(1, 1), (1, 9), (9, 1), (5, 5), (8, 7)])
@pytest.mark.parametrize("budget", [2, 3, 8])
def test_a_gang_of_two_gets_through_any_budget(lengths: tuple[int, int], budget: int) -> None:
    request = make_request("a", prompts=tuple(tuple(range(length)) for length in lengths), max_tokens=3)
    bench = make_bench(max_batch_tokens=budget)
    bench.add(request)
    bench.drain()
    assert bench.tokens["a", 0] == solo(request, 0, 3)[0]


def test_a_gang_of_two_is_preempted_as_one() -> None:
    bench = make_bench(num_blocks=12, max_context=64)
    gang = make_request("gang", prompts=((1, 2, 3, 4, 5), (6, 7)), max_tokens=12, priority=1)
    single = make_request("single", range(10, 18), max_tokens=24)
    bench.add(gang)
    bench.step()
    bench.add(single)
    bench.drain()
    assert bench.scheduler.stats.preemptions > 0
    for request, tokens in ((gang, 12), (single, 24)):
        assert bench.tokens[request.request_id, 0] == solo(request, 0, tokens)[0]


# -- blocks --


def test_preempted_equals_undisturbed() -> None:
    bench = make_bench(num_blocks=12, max_context=48)
    requests = [make_request(name, (ord(name), 2, 3, 4, 5), max_tokens=25) for name in "abc"]
    for request in requests:
        bench.add(request)
    bench.drain()
    assert bench.scheduler.stats.preemptions > 0
    usages = [bench.ends[name, 0].usage for name in "abc"]
    assert next(usage.preemptions for usage in usages if usage is not None) == 0, "the first to come loses nothing"
    for request in requests:
        assert bench.tokens[request.request_id, 0] == solo(request, 0, 25)[0]


def test_the_least_urgent_then_the_youngest_loses_its_blocks() -> None:
    bench = make_bench(num_blocks=6, max_context=24)
    for name, priority in (("a", 1), ("b", 0), ("c", 0)):
        bench.add(make_request(name, (ord(name),) * 7, max_tokens=12, priority=priority))
    bench.drain()
    counts = {name: end.usage.preemptions for (name, _), end in bench.ends.items() if end.usage is not None}
    assert counts["b"] == 0
    assert counts["a"] >= 1
    assert next(iter(bench.ends))[0] == "b"


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    bench = make_bench(num_blocks=10, max_context=40)
    bench.add(make_request("a", range(8), max_tokens=16))
    bench.add(make_request("b", range(20, 30), max_tokens=16, priority=1))
    bench.drain()
    usage = bench.ends["b", 0].usage
    assert usage is not None
    assert usage.preemptions == 1
    assert bench.runner.computed < (8 + 15) + (10 + 15) + 10, "everything was computed anew"


@pytest.mark.parametrize("groups", [(KVGroup(),), (KVGroup(), KVGroup(window=6, sink=1))])
def test_a_small_pool_serves_eight_long_requests_without_thrashing(groups: tuple[KVGroup, ...]) -> None:
    bench = make_bench(num_blocks=12 * len(groups), max_context=44, groups=groups)
    requests = [make_request(str(index), (index, *range(5)), max_tokens=36) for index in range(8)]
    for request in requests:
        bench.add(request)
    bench.drain(limit=1000)
    for request in requests:
        end = bench.ends[request.request_id, 0]
        assert end.usage is not None
        assert end.usage.preemptions <= 4
        assert bench.tokens[request.request_id, 0] == solo(request, 0, 36)[0]


def test_a_prompt_under_way_takes_blocks_from_a_decode_planned_in_the_same_step() -> None:
    requests = [make_request("late", (1, 2, 3), max_tokens=20, priority=1), make_request("urgent", range(10, 30), max_tokens=3)]
    bench = make_bench(num_blocks=7, max_batch_tokens=4)
    bench.add(requests[0])
    bench.step()
    bench.add(requests[1])
    while not bench.scheduler.stats.preemptions:
        plan = bench.step()
        assert plan is not None
    assert [piece.tokens for piece in plan.slices] == [tuple(range(26, 30))], "its place in the step was not handed over"
    bench.drain()
    for request in requests:
        assert bench.tokens[request.request_id, 0] == solo(request, 0, request.sampling.max_tokens)[0]


def test_blocks_that_a_prompt_under_way_still_needs_are_not_given_to_newcomers() -> None:
    bench = make_bench(num_blocks=10, max_batch_tokens=8)
    bench.add(make_request("a", range(30), max_tokens=1))  # the first step computes a part of it
    bench.add(make_request("b", range(50, 66), max_tokens=1))
    plan = bench.plan()
    assert plan is not None
    assert (bench.scheduler.num_running, bench.scheduler.stats.kv_blocks_used) == (1, 2)
    bench.commit(plan)
    bench.drain()
    assert bench.scheduler.stats.preemptions == 0


@pytest.mark.parametrize(("seniors", "num_blocks"), [(6, 24), (8, 30), (12, 40)])
def test_a_preempted_gang_comes_back_only_when_everybody_can_grow(seniors: int, num_blocks: int) -> None:
    """Seniors that end one after another each free enough for the last one to come in, and would throw it out again each time."""
    bench = make_bench(num_blocks=num_blocks, max_context=96, max_batch_tokens=64)
    for index in range(seniors):
        bench.add(make_request(str(index), (index, 1, 2), max_tokens=30 + 6 * index))
    bench.add(make_request("last", (50, 1, 2), max_tokens=60))
    bench.drain()
    assert max(end.usage.preemptions for end in bench.ends.values() if end.usage is not None) == 2


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    bench = make_bench(num_blocks=10, max_context=40)
    bench.add(make_request("first", (1, 2, 3), max_tokens=10))
    bench.step()
    bench.add(make_request("large", range(36), max_tokens=2))
    for index in range(40):
        bench.add(make_request(str(index), (index, index), max_tokens=10))
        bench.step()
        if ("large", 0) in bench.ends:
            break
    assert finish_of(bench, "large") == "length"
    assert not any(key[0].isdigit() for key in bench.ends), "a small one behind it ended before it"


# -- ends --


@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding", "preempted", "awaiting", "in flight"])
@pytest.mark.parametrize("finish", ["abort", "stop"])
def test_abort_in_every_state(state: str, finish: str) -> None:
    bench = make_bench(max_batch_tokens=4, num_blocks=8, max_context=32)
    request = make_request("a", range(14), max_tokens=14)
    if state == "awaiting":
        bench.add(make_request("producer", range(14), max_tokens=2))
        bench.add(request)
        bench.step()
    elif state == "preempted":
        bench.add(request)
        bench.step()
        bench.add(make_request("urgent", range(50, 66), max_tokens=12, priority=-1))
        while not bench.scheduler.stats.preemptions:
            bench.step()
    else:
        bench.add(request)
        for _ in range({"waiting": 0, "prefilling": 1, "decoding": 6, "in flight": 1}[state]):
            bench.step()
    plan = bench.plan() if state == "in flight" else None
    (output,) = bench.scheduler.abort("a", None, finish, bench.now)  # type: ignore[arg-type]
    bench.take([output])
    assert (output.finish, output.token) == (finish, None)
    assert output.usage is not None
    bench.scheduler.check()
    assert bench.scheduler.abort("a", None, "abort", bench.now) == []
    if plan is not None:
        bench.commit(plan)
    bench.drain()
    assert bench.scheduler.stats.kv_blocks_used == 0
    assert len(bench.tokens.get(("a", 0), [])) == (3 if state == "decoding" else 0) or state == "preempted"


def test_one_choice_can_be_aborted_alone() -> None:
    bench = make_bench()
    bench.add(make_request("a", range(6), num_choices=3, max_tokens=5))
    bench.step()
    bench.take(bench.scheduler.abort("a", 1, "abort", bench.now))
    bench.drain()
    assert [finish_of(bench, "a", choice) for choice in range(3)] == ["length", "abort", "length"]
    assert bench.scheduler.abort("nobody", None, "abort", 0.0) == []


def test_deadlines_end_waiting_and_running_requests() -> None:
    bench = make_bench(max_sequences=1)
    bench.add(make_request("a", max_tokens=50, deadline=3.0))
    bench.add(make_request("b", (9,), max_tokens=2, deadline=2.0))
    bench.add(make_request("c", (8,), max_tokens=2))
    bench.drain()
    assert [finish_of(bench, name) for name in "abc"] == ["deadline", "deadline", "length"]
    assert len(bench.tokens["a", 0]) == 3
    assert ("b", 0) not in bench.tokens


def test_a_failed_step_ends_only_those_in_it() -> None:
    bench = make_bench(max_sequences=2)
    for name in "abc":
        bench.add(make_request(name, (ord(name), 1), max_tokens=3))
    plan = bench.plan()
    assert plan is not None
    bench.take(bench.scheduler.fail(plan, bench.now))
    bench.scheduler.check()
    bench.drain()
    assert [finish_of(bench, name) for name in "abc"] == ["error", "error", "length"]


def test_what_a_failed_step_wrote_is_never_found() -> None:
    bench = make_bench()
    bench.add(make_request("a", range(12)))
    plan = bench.plan()
    assert plan is not None
    bench.take(bench.scheduler.fail(plan, bench.now))
    bench.add(make_request("b", range(12)))
    bench.drain()
    usage = bench.ends["b", 0].usage
    assert usage is not None
    assert usage.cached_tokens == 0


def test_times_and_counts_of_a_finished_choice() -> None:
    bench = make_bench(max_sequences=1, max_batch_tokens=4)
    bench.add(make_request("a", (1,), max_tokens=2))  # two steps of a second each
    bench.add(make_request("b", range(20, 28), max_tokens=3))  # two chunks, then two decodes
    bench.drain()
    usage = bench.ends["b", 0].usage
    assert usage is not None
    assert (usage.queue_s, usage.prefill_s, usage.decode_s) == (2.0, 2.0, 2.0)
    stats = bench.scheduler.stats
    assert (stats.prompt_tokens, stats.generation_tokens, stats.steps) == (9, 5, 6)


# -- refusals --


@pytest.mark.parametrize(
    ("request_fields", "error"),
    [
        ({"prompt": range(32)}, ContextLengthError),
        ({"prompt": ()}, RequestError),
        ({"prompts": ()}, RequestError),
        ({"prompts": ((1,), (2,), (3,))}, RequestError),
        ({"max_tokens": 0}, RequestError),
        ({"num_choices": 0}, RequestError),
        ({"request_id": "taken"}, RequestError),
    ],
)
def test_what_can_never_run_is_refused_at_once(request_fields: dict[str, object], error: type[Exception]) -> None:
    bench = make_bench(max_context=32)
    bench.add(make_request("taken", max_tokens=1))
    before = bench.scheduler.stats
    with pytest.raises(error):
        bench.add(make_request(**request_fields))  # type: ignore[arg-type]
    assert bench.scheduler.stats == before
    bench.drain()


def test_more_than_the_pool_is_refused_and_the_next_one_runs() -> None:
    bench = make_bench(num_blocks=4, max_context=64)
    with pytest.raises(ContextLengthError, match="more than the K/V cache"):
        bench.add(make_request("a", range(17)))
    bench.add(make_request("b", range(16), max_tokens=5))
    bench.drain()
    assert len(bench.tokens["b", 0]) == 1, "the pool holds the prompt; the one drawn id needs no place"


def test_guidance_needs_two_rows() -> None:
    for sizes in ({"max_sequences": 1}, {"max_batch_tokens": 1}):
        with pytest.raises(RequestError, match="guidance"):
            make_bench(**sizes).add(make_request("a", prompts=((1,), (2,))))  # type: ignore[arg-type]


def test_the_queue_is_bounded_in_requests_and_in_tokens() -> None:
    bench = make_bench(max_waiting_requests=2, max_waiting_tokens=20, max_sequences=1)
    bench.add(make_request("long", range(30), num_choices=2))  # alone it may be longer than the bound
    with pytest.raises(OverloadedError):
        bench.add(make_request("b", (1,)))
    bench.step()
    bench.add(make_request("b", (1,)))
    bench.add(make_request("c", (1,)))
    with pytest.raises(OverloadedError) as caught:
        bench.add(make_request("d", (1,)))
    assert caught.value.retry_after_s
    bench.take(bench.scheduler.abort("b", None, "abort", 0.0))
    bench.add(make_request("d", (1,)))
    bench.drain()
    assert set(bench.ends) == {("long", 0), ("long", 1), ("b", 0), ("c", 0), ("d", 0)}


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make_bench(num_blocks=0)


# -- bounds --


def test_nothing_is_left_behind() -> None:
    bench = make_bench(num_blocks=12, max_sequences=4)
    for index in range(60):
        bench.add(make_request(str(index), (index, *range(index % 9)), num_choices=2, deadline=bench.now + 9))
        bench.step()
        if index % 3 == 0:
            bench.take(bench.scheduler.abort(str(index), 0, "abort", bench.now))
    bench.drain()
    scheduler = bench.scheduler
    roster = scheduler._roster
    maps = (scheduler._live, roster.running, roster.waiting, roster._producers)
    assert [len(kept) for kept in maps] == [0] * 4
    assert (scheduler._intake.num_requests, scheduler._intake.num_tokens, roster._num_sequences) == (0, 0, 0)
    assert len(bench.ends) == 120


def test_planning_64_decodes_is_fast() -> None:
    """The aim is well under a millisecond for plan and commit together; the bound leaves room for a slow or busy machine."""
    bench = make_bench(num_blocks=64 * 70, block_size=16, max_batch_tokens=4096, max_sequences=64, max_context=2048)
    for index in range(64):
        bench.add(make_request(str(index), [index] * 600, max_tokens=400))
    drawn = Drawn(1)
    times = []
    while len(times) < 120:
        started = time.perf_counter()
        plan, _ = bench.scheduler.plan(0.0)
        assert plan is not None
        bench.scheduler.commit(plan, [drawn] * len(plan.samples), 0.0)
        if len(plan.samples) == len(plan.slices) == 64 == plan.num_tokens:
            times.append(time.perf_counter() - started)
    assert statistics.median(times) < 0.005
