"""Prompts that are read: what the cache may give, what each slice tells, what a preemption may not lose, and ends without ids."""

from __future__ import annotations

import pytest

from service.errors import ContextLengthError, RequestError
from service.scheduling.plan import Drawn, KVGroup, PromptReading, StepPlan
from service.scheduling.reading import Pool, Read
from tests.scheduling.model import Bench, make_bench, make_request, solo, solo_reading

LOGPROBS = Read(first=1, num_top=2)
READS = [LOGPROBS, Read(first=7), Read(pool="last"), Read(pool="mean"), Read(pool="cls"), Read(first=3, num_top=1, pool="mean")]


def run(bench: Bench, *requests: object) -> list[StepPlan]:
    for request in requests:
        bench.add(request)  # type: ignore[arg-type]
    plans = []
    while bench.scheduler.has_work:
        plan = bench.step()
        assert plan is not None
        plans.append(plan)
    return plans


# -- what is told --


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("budget", [1, 3, 8, 64])
def test_a_reading_is_the_same_however_the_prompt_is_cut(read: Read, budget: int) -> None:
    bench = make_bench(max_batch_tokens=budget)
    request = make_request("a", range(21), max_tokens=4, read=read)
    run(bench, request)
    assert bench.readings == {("a", 0): solo_reading(request)}
    assert bench.tokens["a", 0] == solo(request, 0, 4)[0]


def test_the_reading_comes_with_the_first_id() -> None:
    bench = make_bench(max_batch_tokens=8)
    bench.add(make_request("a", range(20), max_tokens=3, read=LOGPROBS))
    for _ in range(2):
        plan = bench.step()
        assert plan is not None
        assert plan.reads
        assert not bench.readings
    plan = bench.step()
    assert plan is not None
    assert plan.samples
    assert bench.readings
    plan = bench.step()
    assert plan is not None
    assert not plan.reads


def test_only_the_first_choice_reads() -> None:
    bench = make_bench()
    request = make_request("a", range(9), max_tokens=3, num_choices=4, read=LOGPROBS)
    run(bench, request)
    assert bench.readings == {("a", 0): solo_reading(request)}
    assert [bench.tokens["a", choice] for choice in range(4)] == [solo(request, choice, 3)[0] for choice in range(4)]


def test_a_read_that_begins_behind_the_prompt_tells_nothing_and_is_told() -> None:
    bench = make_bench()
    run(bench, make_request("a", range(9), max_tokens=0, read=Read(first=9)))
    assert bench.readings == {("a", 0): PromptReading()}


def test_the_conditional_prompt_of_a_guided_gang_is_read() -> None:
    bench = make_bench(max_batch_tokens=5)
    request = make_request("a", prompts=(tuple(range(11)), (4, 4, 1)), max_tokens=3, guidance=2.0, read=Read(first=2, pool="mean"))
    run(bench, request)
    assert bench.readings["a", 0] == solo_reading(request)


def test_a_choice_that_is_aborted_in_its_prompt_has_no_reading() -> None:
    bench = make_bench(max_batch_tokens=8)
    bench.add(make_request("a", range(20), max_tokens=3, read=LOGPROBS))
    plan = bench.plan()
    assert plan is not None
    bench.take(bench.scheduler.abort("a", None, "abort", bench.now))
    bench.commit(plan)
    assert not bench.readings
    assert bench.ends["a", 0].finish == "abort"


# -- no ids --


def test_without_ids_a_prompt_ends_once_it_is_computed() -> None:
    bench = make_bench(max_batch_tokens=8)
    request = make_request("a", range(13), max_tokens=0, read=LOGPROBS)
    plans = run(bench, request)
    assert [len(plan.samples) for plan in plans] == [0, 0]
    assert bench.readings["a", 0] == solo_reading(request)
    end = bench.ends["a", 0]
    assert end.usage is not None
    assert (end.finish, end.token, end.usage.completion_tokens, end.usage.prompt_tokens) == ("length", None, 0, 13)
    assert (end.usage.prefill_s, end.usage.decode_s) == (2.0, 0.0)
    stats = bench.scheduler.stats
    assert (stats.prompt_tokens, stats.generation_tokens, stats.kv_blocks_used) == (13, 0, 0)


def test_without_ids_a_prompt_may_fill_the_context() -> None:
    bench = make_bench(max_context=16, num_blocks=4, block_size=4)
    run(bench, make_request("a", range(16), max_tokens=0, read=LOGPROBS))
    assert len(bench.readings["a", 0].logprobs) == 15
    with pytest.raises(ContextLengthError):
        bench.add(make_request("b", range(16), max_tokens=1, read=LOGPROBS))
    with pytest.raises(ContextLengthError):
        bench.add(make_request("c", range(17), max_tokens=0, read=LOGPROBS))


def test_no_ids_and_nothing_to_read_is_refused() -> None:
    bench = make_bench()
    with pytest.raises(RequestError, match="max_tokens"):
        bench.add(make_request("a", max_tokens=0))


@pytest.mark.parametrize("read", [Read(), Read(first=4), Read(first=-1), Read(first=1, num_top=21), Read(pool="sum")])  # type: ignore[arg-type]
def test_a_read_that_makes_no_sense_is_refused(read: Read) -> None:
    bench = make_bench()
    with pytest.raises(RequestError):
        bench.add(make_request("a", (1, 2, 3), read=read))
    assert not bench.scheduler.has_work


# -- the prefix cache --


def cached(bench: Bench, request_id: str) -> int:
    usage = bench.ends[request_id, 0].usage
    assert usage is not None
    return usage.cached_tokens


@pytest.mark.parametrize(
    ("read", "hit"),
    [
        (Read(first=1), 0),
        (Read(first=12), 8),  # row 11 is read, and is in the third block
        (Read(first=13), 12),  # row 12 is the first that is read
        (Read(first=20), 19),  # nothing is read but what comes with the last row, which alone is computed
        (Read(pool="last"), 19),
        (Read(pool="mean"), 0),
        (Read(pool="cls"), 0),
        (Read(first=13, pool="last"), 12),
    ],
)
def test_what_is_read_is_computed_and_the_rest_is_found(read: Read, hit: int) -> None:
    bench = make_bench(block_size=4)
    run(bench, make_request("first", range(20), max_tokens=1))
    request = make_request("a", range(20), max_tokens=0, read=read)
    run(bench, request)
    assert cached(bench, "a") == hit
    assert bench.readings["a", 0] == solo_reading(request)


def test_many_readings_of_one_beginning_compute_it_once() -> None:
    bench = make_bench(block_size=4, max_batch_tokens=64, num_blocks=128)
    shared = tuple(range(40))
    requests = [make_request(str(label), (*shared, label, label + 1), max_tokens=0, read=Read(first=40)) for label in range(10)]
    plans = run(bench, *requests)
    # Position 39 is read, so the block before it is the last that can be shared.
    assert bench.runner.computed == 42 + 9 * (42 - 36)
    assert len(plans) == 2
    assert all(bench.readings[request.request_id, 0] == solo_reading(request) for request in requests)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_who_can_hit_nothing_waits_for_nobody(pool: Pool) -> None:
    bench = make_bench(block_size=4, max_batch_tokens=64)
    plans = run(bench, *(make_request(name, range(20), max_tokens=0, read=Read(pool=pool)) for name in "abc"))
    assert [len(plan.slices) for plan in plans] == [3]


# -- preemption --


def make_crowded(max_batch_tokens: int) -> Bench:
    """Eight blocks, and an urgent request that is being generated and will need seven of them."""
    bench = make_bench(num_blocks=8, block_size=4, max_batch_tokens=max_batch_tokens, max_context=32)
    bench.add(make_request("urgent", range(40, 44), max_tokens=24))
    while not bench.tokens:
        bench.step()
    return bench


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_a_preemption_loses_nothing_and_tells_nothing_twice(read: Read, max_tokens: int) -> None:
    bench = make_crowded(max_batch_tokens=4)
    reader = make_request("reader", range(24), max_tokens=max_tokens, read=read, priority=1)
    bench.add(reader)
    targets: list[int] = []
    while bench.scheduler.has_work:
        was_read = bool(bench.readings)
        plan = bench.step()
        assert plan is not None
        if not was_read:
            preemptions = bench.scheduler.stats.preemptions
        targets += [target for one in plan.reads for target in one.targets]
    assert preemptions > 0, "it was not preempted in its prompt"
    assert bench.readings == {("reader", 0): solo_reading(reader)}
    assert bench.tokens.get(("reader", 0), []) == solo(reader, 0, max_tokens)[0]
    assert targets == list(range(read.first, 24)) if read.first else not targets


def test_a_preemption_after_the_prompt_reads_nothing_again() -> None:
    bench = make_crowded(max_batch_tokens=16)
    reader = make_request("reader", range(12), max_tokens=14, read=Read(first=1, pool="mean"), priority=1)
    bench.add(reader)
    bench.step()
    assert bench.readings
    while bench.scheduler.has_work:
        plan = bench.step()
        assert plan is not None
        assert not plan.reads
    assert bench.scheduler.stats.preemptions > 0
    assert bench.tokens["reader", 0] == solo(reader, 0, 14)[0]


# -- commit --


def test_readings_must_fit_the_plan() -> None:
    bench = make_bench()
    bench.add(make_request("a", range(6), max_tokens=2, read=LOGPROBS))
    plan = bench.plan()
    assert plan is not None
    with pytest.raises(ValueError, match="readings"):
        bench.scheduler.commit(plan, [Drawn(1)], 0.0)
    bench.commit(plan)


def test_a_failed_step_ends_those_that_were_read_in_it() -> None:
    bench = make_bench()
    bench.add(make_request("a", range(6), max_tokens=0, read=LOGPROBS))
    plan = bench.plan()
    assert plan is not None
    bench.take(bench.scheduler.fail(plan, 1.0))
    assert bench.ends["a", 0].finish == "error"
    assert bench.ends["a", 0].reading is None
    assert not bench.scheduler.has_work


# -- whole prompts --


def test_whole_prompts_are_computed_in_one_step_or_wait() -> None:
    bench = make_bench(max_batch_tokens=16, whole_prompts=True)
    requests = [
        make_request(name, range(length), max_tokens=0, read=Read(pool="mean")) for name, length in zip("abc", (9, 9, 5), strict=True)
    ]
    plans = run(bench, *requests)
    assert [[len(piece.tokens) for piece in plan.slices] for plan in plans] == [[9, 5], [9]]
    assert all(bench.readings[request.request_id, 0] == solo_reading(request) for request in requests)


def test_a_prompt_that_no_step_can_hold_is_refused_at_once() -> None:
    bench = make_bench(max_batch_tokens=16, whole_prompts=True)
    with pytest.raises(ContextLengthError, match="16"):
        bench.add(make_request("a", range(17), max_tokens=0, read=Read(pool="mean")))
    bench.add(make_request("b", range(16), max_tokens=0, read=Read(pool="mean")))
    bench.drain()


def test_whole_sequences_that_grow_stay_within_a_step() -> None:
    """So that each can be computed again, in one step, after a preemption."""
    bench = make_bench(max_batch_tokens=12, whole_prompts=True, num_blocks=4, block_size=4)
    requests = [make_request(name, range(at, at + 6), max_tokens=30) for at, name in enumerate("ab")]
    run(bench, *requests)
    assert bench.scheduler.stats.preemptions > 0
    for request in requests:
        assert bench.tokens[request.request_id, 0] == solo(request, 0, 7)[0]


def test_whole_prompts_need_all_rows_of_a_window_at_once() -> None:
    bench = make_bench(max_batch_tokens=32, whole_prompts=True, num_blocks=6, block_size=4, groups=(KVGroup(window=4), KVGroup()))
    with pytest.raises(ContextLengthError, match="K/V cache"):
        bench.add(make_request("a", range(13), max_tokens=0, read=Read(pool="mean")))
    run(bench, make_request("b", range(12), max_tokens=0, read=Read(pool="mean")))
