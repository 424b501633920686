"""Prefixes are computed once, found again only by who may, and never believed by hash alone. Windows, evictions, equal arrivals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.scheduling.block_pool import BlockKey, BlockPool
from service.scheduling.plan import KVGroup
from tests.scheduling.model import Bench, make_bench, make_request

PROMPT = tuple(range(1, 19))  # 18 tokens: four full blocks of 4, and a tail of 2


def usage_of(bench: Bench, request_id: str, choice: int = 0) -> tuple[int, int]:
    """(prompt tokens, cached tokens)"""
    usage = bench.ends[request_id, choice].usage
    assert usage is not None
    return usage.prompt_tokens, usage.cached_tokens


def test_second_request_hits_full_blocks_and_computes_the_rest() -> None:
    bench = make_bench()
    bench.add(make_request("a", PROMPT))
    bench.drain()
    bench.add(make_request("b", PROMPT))
    plan = bench.step()
    assert plan is not None
    assert (plan.slices[0].start, plan.slices[0].tokens) == (16, PROMPT[16:])
    bench.drain()
    assert usage_of(bench, "a") == (18, 0)
    assert usage_of(bench, "b") == (18, 16)
    assert bench.tokens["a", 0] == bench.tokens["b", 0]
    assert (bench.scheduler.stats.prefix_queries, bench.scheduler.stats.prefix_hits) == (36, 16)


def test_the_last_prompt_token_is_always_computed() -> None:
    bench = make_bench()
    for name in "ab":
        bench.add(make_request(name, PROMPT[:16]))
        bench.drain()
    assert usage_of(bench, "b") == (16, 15)
    assert bench.tokens["a", 0] == bench.tokens["b", 0]


def test_a_last_token_whose_block_is_found_is_not_written() -> None:
    bench = make_bench()
    bench.add(make_request("a", PROMPT[:16], max_tokens=40))
    bench.step()
    bench.add(make_request("b", PROMPT[:16]))
    plan = bench.plan()
    assert plan is not None
    assert [(piece.start, len(piece.tokens), piece.is_first_known) for piece in plan.slices] == [(16, 1, False), (15, 1, True)]
    assert plan.slices[0].tables[0][:4] == plan.slices[1].tables[0]
    bench.commit(plan)
    plan = bench.step()
    assert plan is not None
    assert not any(piece.is_first_known for piece in plan.slices)
    bench.drain()


def test_behind_a_window_the_last_block_is_computed() -> None:
    bench = make_bench(groups=(KVGroup(), KVGroup(window=5)))
    for name in "ab":
        bench.add(make_request(name, PROMPT[:16]))
        bench.drain()
    assert usage_of(bench, "b") == (16, 12)


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    bench = make_bench()
    bench.add(make_request("a", PROMPT, max_tokens=7))
    bench.drain()
    bench.add(make_request("b", (*PROMPT, *bench.tokens["a", 0], 9, 9)))
    bench.drain()
    assert usage_of(bench, "b") == (27, 24)  # 18 + 6 were computed; the seventh drawn id never was


def test_tenants_share_nothing() -> None:
    bench = make_bench()
    for name, tenant in (("a", "x"), ("b", "y"), ("c", "x")):
        bench.add(make_request(name, PROMPT, tenant=tenant))
        bench.drain()
    assert [usage_of(bench, name)[1] for name in "abc"] == [0, 0, 16]


def test_without_the_cache_nothing_is_found_and_nobody_waits() -> None:
    bench = make_bench(has_prefix_cache=False)
    for name in "ab":
        bench.add(make_request(name, PROMPT))
    bench.drain()
    assert bench.scheduler.stats.kv_blocks_cached == 0
    assert bench.runner.computed == 2 * (18 + 3)
    assert usage_of(bench, "b") == (18, 0)


def test_eight_choices_compute_the_prompt_once() -> None:
    bench = make_bench()
    bench.add(make_request("a", PROMPT, max_tokens=1, num_choices=8))
    bench.drain()
    assert bench.runner.computed == 16 + 8 * 2  # the full blocks once, the unshared tail by each
    assert bench.scheduler.stats.prompt_tokens == 18
    assert {usage_of(bench, "a", choice)[0] for choice in range(8)} == {18}
    assert len({bench.tokens["a", choice][0] for choice in range(8)}) > 1, "choices draw with seeds of their own"


@pytest.mark.parametrize("max_batch_tokens", [3, 8, 512])
def test_sixteen_equal_arrivals_compute_the_prompt_once(max_batch_tokens: int) -> None:
    bench = make_bench(max_batch_tokens=max_batch_tokens)
    for index in range(16):
        bench.add(make_request(str(index), PROMPT, max_tokens=1))
    bench.drain()
    assert bench.runner.computed == 16 + 16 * 2


def test_a_sequence_waits_only_as_far_as_the_prompts_agree() -> None:
    bench = make_bench(max_batch_tokens=4)
    bench.add(make_request("a", PROMPT))
    bench.add(make_request("b", (*PROMPT[:4], *range(30, 40))))
    bench.step()
    assert bench.scheduler.num_running == 1
    bench.step()  # the shared block is sealed; from here on b computes its own
    bench.drain()
    assert usage_of(bench, "b") == (14, 4)


@pytest.mark.parametrize("how", ["abort", "fail", "preempt"])
def test_a_waiting_one_goes_on_when_its_producer_does_not(how: str) -> None:
    bench = make_bench(max_batch_tokens=4, num_blocks=8)
    bench.add(make_request("a", PROMPT, max_tokens=2, priority=0))
    bench.step()
    bench.add(make_request("b", PROMPT, max_tokens=2, priority=0))
    plan = bench.plan()
    assert plan is not None
    assert bench.scheduler.num_waiting == 1
    if how == "abort":
        bench.take(bench.scheduler.abort("a", None, "abort", bench.now))
        bench.commit(plan)
    elif how == "fail":
        bench.take(bench.scheduler.fail(plan, bench.now))
    else:
        bench.commit(plan)
        bench.add(make_request("c", range(40, 48), max_tokens=20, priority=-1))
        bench.step()
    bench.drain()
    assert bench.ends["b", 0].finish == "length"
    if how == "preempt":
        assert bench.tokens["a", 0] == bench.tokens["b", 0]


def test_an_urgent_request_does_not_wait_for_a_less_urgent_one() -> None:
    bench = make_bench(max_batch_tokens=4)
    bench.add(make_request("a", PROMPT, priority=1))
    bench.step()
    bench.add(make_request("b", PROMPT, priority=0))
    bench.step()
    assert bench.scheduler.num_running == 2


def test_an_aborted_prefill_leaves_its_prefix_behind() -> None:
    bench = make_bench(max_batch_tokens=8)
    bench.add(make_request("a", PROMPT))
    bench.step()
    bench.take(bench.scheduler.abort("a", None, "abort", bench.now))
    bench.add(make_request("b", PROMPT))
    bench.drain()
    assert usage_of(bench, "b") == (18, 8)


def test_a_windowed_group_keeps_and_needs_only_sinks_and_window() -> None:
    groups = (KVGroup(window=6, sink=2), KVGroup(window=5))
    bench = make_bench(groups=groups, num_blocks=40, max_batch_tokens=4)
    bench.add(make_request("a", range(1, 31), max_tokens=8))
    most = 0
    while bench.scheduler.has_work:
        plan = bench.step()
        assert plan is not None
        most = max(most, bench.scheduler.stats.kv_blocks_used)
    assert -1 in plan.slices[0].tables[0]
    assert plan.slices[0].tables[0][0] >= 0, "the sink was given back"
    assert plan.slices[0].tables[1][0] == -1
    assert most <= 2 * 4, "blocks behind the window stayed in use"
    bench.add(make_request("b", range(1, 31)))
    plan = bench.step()
    assert plan is not None
    assert plan.slices[0].start == 28
    assert plan.slices[0].tables[0].count(-1) == 4  # rows 1 ... 4 of 8
    bench.drain()


def test_a_hit_stops_where_a_window_was_evicted() -> None:
    bench = make_bench(groups=(KVGroup(), KVGroup(window=5)), num_blocks=24, max_batch_tokens=64)
    bench.add(make_request("a", PROMPT, max_tokens=1))
    bench.drain()
    pool = bench.scheduler._pool
    key = bench.scheduler._tables.keys(_sequence(bench, PROMPT), 4)[3]
    block = pool.find(1, key)
    assert block is not None
    del pool._cached[block]  # evict exactly the window's last block
    pool._evict(block)
    pool._free.append(block)
    bench.scheduler.check()
    bench.add(make_request("b", PROMPT))
    bench.drain()
    assert usage_of(bench, "b") == (18, 12)


def _sequence(bench: Bench, prompt: tuple[int, ...]):  # type: ignore[no-untyped-def]
    return bench.scheduler._make_gang(make_request("x", prompt), 0, 1, 0.0).sequences[0]


def test_a_key_covers_everything_that_a_block_depends_on() -> None:
    root = BlockKey.root("")
    base = BlockKey.make(root, (1, 2))
    others = [
        BlockKey.make(BlockKey.root("x"), (1, 2)),
        BlockKey.make(root, (1, 3)),
        BlockKey.make(root, (1, 2, 0)),
        BlockKey.make(base.digest, (1, 2)),
    ]
    assert len({key.digest for key in [base, *others]}) == 5
    assert BlockKey.make(root, [1, 2]) == base


def test_a_colliding_hash_is_not_believed() -> None:
    pool = BlockPool(2, 1)
    key = BlockKey.make(BlockKey.root(""), (1, 2))
    pool.seal(pool.allocate(), 0, key)
    assert pool.find(0, key) is not None
    assert pool.find(0, replace(key, tokens=(1, 3))) is None
    assert pool.find(0, replace(key, parent=b"")) is None


def test_blocks_are_evicted_longest_unused_first_and_only_when_none_is_free() -> None:
    pool = BlockPool(4, 1)
    keys = [BlockKey.make(BlockKey.root(""), (index,)) for index in range(3)]
    blocks = [pool.allocate() for _ in keys]
    for block, key in zip(blocks, keys, strict=True):
        pool.seal(block, 0, key)
    for index in (1, 0, 2):
        pool.release(blocks[index])
    assert (pool.num_available, pool.num_cached, pool.num_used) == (4, 3, 0)
    assert pool.allocate() not in blocks
    assert pool.allocate() == blocks[1]
    pool.share(blocks[0])  # a hit takes it off the list
    assert pool.allocate() == blocks[2]
    assert pool.find(0, keys[0]) == blocks[0]
    assert pool.find(0, keys[1]) is None
    with pytest.raises(IndexError):
        pool.allocate()
    pool.check(dict.fromkeys(range(4), 1))


@pytest.mark.parametrize("damage", ["reference", "leak", "key"])
def test_check_sees_damage(damage: str) -> None:
    pool = BlockPool(3, 1)
    block = pool.allocate()
    pool.seal(block, 0, BlockKey.make(b"", (1,)))
    if damage == "reference":
        pool._refs[block] = 2
    elif damage == "leak":
        pool._free.pop()
    else:
        pool._found[0].clear()
    with pytest.raises(AssertionError):
        pool.check({block: 1})
