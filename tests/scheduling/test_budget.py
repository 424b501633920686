"""What a step may hold of prompts: the arithmetic of costs, and plans that keep to them while everything still moves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.scheduling.budget import LEAST_CHUNK, PromptLimit, StepBudget, spans
from service.scheduling.plan import StepPlan
from tests.scheduling.model import Bench, make_bench, make_request

_costs = st.lists(st.floats(1e-3, 10), min_size=1, max_size=6).map(tuple)


def test_spans_double() -> None:
    assert list(spans(0, 1000)) == [(0, 128), (1, 128), (2, 256), (3, 488)]
    assert list(spans(127, 2)) == [(0, 1), (1, 1)]
    assert list(spans(600, 7)) == [(3, 7)]
    assert list(spans(5, 0)) == []


@given(start=st.integers(0, 5000), count=st.integers(0, 3000), left=st.floats(0, 5000), costs=_costs)
def test_as_many_tokens_as_can_be_paid(start: int, count: int, left: float, costs: tuple[float, ...]) -> None:
    limit = PromptLimit(left, costs)
    found = limit.tokens(start, count, left)
    assert 0 <= found <= count
    assert limit.cost(start, found) <= left * (1 + 1e-9)
    if found < count:
        assert limit.cost(start, found + 1) > left * (1 - 1e-9)


def test_a_budget_gives_the_least_once() -> None:
    budget = StepBudget(100, PromptLimit(4.0, (1.0,)))
    assert budget.room(0, 50) == LEAST_CHUNK
    budget.spend(5)
    budget.charge(0, 5)
    assert budget.has_room_for_prompts
    assert budget.room(0, 50) == LEAST_CHUNK - 5
    budget.spend(3)
    budget.charge(0, 3)
    assert not budget.has_room_for_prompts
    assert budget.tokens == 92


# -- plans --


def prompt_tokens(plan: StepPlan) -> list[int]:
    return [len(piece.tokens) for piece in plan.slices if len(piece.tokens) > 1]


def decoding(*, limit: PromptLimit | None, num_decoding: int = 2, **sizes: int) -> Bench:
    """Sequences that decode for long, and then a limit."""
    bench = make_bench(**{"max_batch_tokens": 200, "max_context": 400, "num_blocks": 400, **sizes})
    for index in range(num_decoding):
        bench.add(make_request(f"old{index}", (50 + index,) * 3, max_tokens=300))
    bench.step()
    assert bench.scheduler.num_decoding == num_decoding
    bench.limit = limit
    return bench


def steps_until_end(bench: Bench, *names: str, most: int = 400) -> list[StepPlan]:
    plans = []
    while any((name, 0) not in bench.ends for name in names):
        plan = bench.step()
        assert plan is not None
        plans.append(plan)
        assert len(plans) < most, "a prompt does not get on"
    return plans


def test_nobody_decodes_before_the_first_token() -> None:
    bench = make_bench(max_batch_tokens=4)
    assert bench.scheduler.num_decoding == 0
    bench.add(make_request("a", range(8), max_tokens=9))
    bench.step()
    assert bench.scheduler.num_decoding == 0
    bench.step()
    assert bench.scheduler.num_decoding == 1
    bench.drain()
    assert bench.scheduler.num_decoding == 0


def test_chunks_of_what_can_be_paid() -> None:
    bench = decoding(limit=PromptLimit(40.0, (1.0, 2.0)))
    bench.add(make_request("new", range(200), max_tokens=1))
    plans = steps_until_end(bench, "new")
    assert [prompt_tokens(plan) for plan in plans] == [[40], [40], [40], [24], [20], [20], [16]]
    assert all(len(plan.slices) == 3 for plan in plans), "the others went on in every step"


def test_without_a_limit_prompts_fill_the_step() -> None:
    bench = decoding(limit=None)
    bench.add(make_request("new", range(250), max_tokens=1))
    assert [prompt_tokens(plan) for plan in steps_until_end(bench, "new")] == [[198], [52]]


def test_a_step_without_prompts() -> None:
    bench = decoding(limit=PromptLimit(0.0, (1.0,), least=0))
    bench.add(make_request("new", range(20), max_tokens=1))
    plan = bench.step()
    assert plan is not None
    assert [len(piece.tokens) for piece in plan.slices] == [1, 1]
    assert bench.scheduler.num_waiting == 1
    bench.limit = None
    bench.drain()


def test_several_prompts_share_what_is_left() -> None:
    bench = decoding(limit=PromptLimit(40.0, (1.0,)))
    for name in "abc":
        bench.add(make_request(name, (ord(name),) * 30, max_tokens=1))
    assert [prompt_tokens(plan) for plan in steps_until_end(bench, *"abc")] == [[30, 10], [20, 20], [10]]


def test_however_dear_a_prompt_moves() -> None:
    bench = decoding(limit=PromptLimit(0.0, (1.0,)))
    bench.add(make_request("new", range(100), max_tokens=1))
    assert [prompt_tokens(plan) for plan in steps_until_end(bench, "new")] == [[LEAST_CHUNK]] * 12 + [[4]]


def test_however_dear_both_rows_of_a_guided_gang_move() -> None:
    bench = decoding(limit=PromptLimit(0.0, (1.0,)))
    bench.add(make_request("new", prompts=(tuple(range(60)), (9,) * 25), max_tokens=3, guidance=2.0))
    assert len(steps_until_end(bench, "new")) <= 85 // (LEAST_CHUNK - 1) + 4


def test_arrivals_begin_in_their_order_and_none_waits_for_ever() -> None:
    bench = decoding(limit=PromptLimit(20.0, (1.0,)), max_sequences=18)
    for index in range(16):
        bench.add(make_request(f"new{index}", (index,) * 40, max_tokens=2))
    plans = steps_until_end(bench, *(f"new{index}" for index in range(16)))
    assert len(plans) <= 16 * 40 / 20 + 16
    begun = [bench.ends[f"new{index}", 0].usage.queue_s for index in range(16)]  # type: ignore[union-attr]
    assert begun == sorted(begun)
    assert all(sum(prompt_tokens(plan)) <= 20 for plan in plans)


def test_whole_prompts_are_not_cut() -> None:
    bench = make_bench(max_batch_tokens=64, whole_prompts=True)
    bench.limit = PromptLimit(1.0, (1.0,))
    bench.add(make_request("a", range(50), max_tokens=1))
    assert bench.drain() == 1


@pytest.mark.parametrize("most", [0.0, 3.0, 17.0, 1000.0])
def test_ids_do_not_depend_on_it(most: float) -> None:
    def run(limit: PromptLimit | None) -> dict[tuple[str, int], list[int]]:
        bench = decoding(limit=limit, num_blocks=60)
        for index in range(5):
            bench.add(make_request(f"new{index}", range(index, 60 + 9 * index), max_tokens=12))
        bench.drain()
        return bench.tokens

    assert run(PromptLimit(most, (0.5, 1.0, 4.0))) == run(None)
