"""What tokens of prompts cost, learned from steps: that chunks then fit into their time, on a machine that is made of a formula."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from service.engine.prompt_pace import PromptPace
from service.scheduling.budget import LEAST_CHUNK
from service.scheduling.plan import Sample, Slice, StepPlan
from service.scheduling.sampling import SamplingParams

MOST_S = 0.03


def step(num_decoding: int, *prompts: tuple[int, int]) -> StepPlan:
    """Of sequences with a token each, and chunks of prompts: start and length."""
    slices = [Slice(index, 100, (1,), ((0,),)) for index in range(num_decoding)]
    slices += [Slice(num_decoding + index, start, (1,) * count, ((0,),)) for index, (start, count) in enumerate(prompts)]
    return StepPlan(0, tuple(slices), ())


def seconds(plan: StepPlan, slowness: float = 1.0) -> float:
    """6 ms for the weights, half a millisecond a decoding sequence; of a prompt 0.3 ms a token and as much again every 500 positions."""
    found = 0.006
    for piece in plan.slices:
        count = len(piece.tokens)
        found += 0.0005 if count == 1 else count * 0.0003 * (1 + (piece.start + count / 2) / 500)
    return found * slowness


def costs(pace: PromptPace) -> tuple[float, ...]:
    limit = pace.next_limit(0)
    assert limit is not None
    return limit.costs


def settled(slowness: float = 1.0) -> PromptPace:
    pace = PromptPace(MOST_S)
    pace.learn(step(0, (0, 512)), seconds(step(0, (0, 512)), slowness))
    for _ in range(20):
        pace.learn(step(16), seconds(step(16), slowness))
    return pace


def prefill(pace: PromptPace, length: int, slowness: Callable[[int], float] = lambda index: 1.0, start: int = 0) -> list[float]:
    """One prompt beside 16; what each of its steps took longer than one without it."""
    added, index = [], 0
    while start < length:
        limit = pace.next_limit(16)
        assert limit is not None
        count = min(max(limit.least, limit.tokens(start, length - start, limit.most)), length - start)
        plan = step(16, (start, count)) if count else step(16)
        took = seconds(plan, slowness(index))
        if count:
            added.append(took - seconds(step(16), slowness(index)))
        pace.learn(plan, took)
        start += count
        index += 1
    return added


def test_no_bound_unless_told() -> None:
    pace = PromptPace()
    pace.learn(step(1, (0, 100)), 1.0)
    assert pace.next_limit(1) is None


def test_before_anything_is_known_chunks_are_small() -> None:
    limit = PromptPace(MOST_S).next_limit(1)
    assert limit is not None
    assert LEAST_CHUNK <= limit.tokens(0, 1000, MOST_S) <= 64


def test_a_prompt_keeps_to_its_time_from_the_first_chunk_on() -> None:
    pace = settled()
    added = prefill(pace, 1024)
    assert max(added) < 1.25 * MOST_S
    again = prefill(pace, 1024)
    assert max(again) < 1.15 * MOST_S
    assert sorted(again)[len(again) // 2] > 0.8 * MOST_S, "and uses it"


def test_a_late_position_is_known_to_be_dearer() -> None:
    pace = settled()
    prefill(pace, 1024)
    assert max(prefill(pace, 3000, start=2000)) < 1.25 * MOST_S


def test_it_follows_a_machine_that_slows_down_and_recovers() -> None:
    pace = settled()
    added = prefill(pace, 2048, lambda index: 1.0 if index < 5 else 3.0)
    assert all(each < 1.4 * 3 * seconds(step(16)) for each in added[12:])
    recovered = prefill(pace, 2048)
    assert recovered[-2] > 0.7 * MOST_S


def test_under_a_steady_load_it_learns_what_others_take() -> None:
    pace = settled()
    prefill(pace, 300_000, lambda index: 3.0, start=299_000)
    slow_s = 3 * seconds(step(16))
    assert slow_s > MOST_S, "what others take is more, and so it is what prompts may add"
    added = prefill(pace, 1024, lambda index: 3.0)
    assert 0.7 * slow_s < sorted(added)[len(added) // 2] < 1.2 * slow_s


def test_steps_without_prompts_are_few_and_never_two_in_a_row() -> None:
    pace = settled()
    limits = []
    for _ in range(100):
        limit = pace.next_limit(16)
        assert limit is not None
        limits.append(limit.least)
        pace.learn(step(16, (0, 50)) if limit.least else step(16), 0.04)
    assert limits.count(0) == 100 // 17
    assert all(later for earlier, later in pairwise(limits) if not earlier)


def test_when_many_more_decode_than_before_it_looks_again() -> None:
    pace = settled()
    pace.learn(step(2), 0.007)
    least = []
    for _ in range(4):
        limit = pace.next_limit(5)
        assert limit is not None
        least.append(limit.least)
        pace.learn(step(5, (0, 50)) if limit.least else step(5), 0.03)
    assert least == [LEAST_CHUNK, LEAST_CHUNK, 0, LEAST_CHUNK]


def test_one_long_moment_is_soon_forgotten() -> None:
    pace = settled()
    added = prefill(pace, 2048, lambda index: 20.0 if index == 4 else 1.0)
    assert min(added[5:-1]) > 0.1 * MOST_S
    assert added[-2] > 0.7 * MOST_S


@pytest.mark.parametrize("count", [2, LEAST_CHUNK - 1])
def test_short_ends_of_prompts_tell_nothing(count: int) -> None:
    pace = settled()
    before = costs(pace)
    pace.learn(step(1, (496, count)), 5.0)
    assert costs(pace) == before


def test_a_step_of_pictures_alone_tells_nothing() -> None:
    pace = settled()
    before = costs(pace)
    pace.learn(StepPlan(0, (), ()), 5.0)
    assert costs(pace) == before
    assert max(prefill(pace, 512)) < 1.25 * MOST_S


def test_guesses_are_no_prompt() -> None:
    pace = settled()
    before = costs(pace)
    guessed = Slice(0, 50, (1,) * 20, ((0,),))
    params = SamplingParams(max_tokens=9)
    samples = tuple(Sample(0, (0,), params, 51 + ahead, 1, back=19 - ahead) for ahead in range(20))
    pace.learn(StepPlan(0, (guessed,), samples), 5.0)
    assert costs(pace) == before


def test_what_costs_nothing_is_soon_dear_again() -> None:
    pace = settled()
    for _ in range(30):
        pace.learn(step(16, (0, 100)), 0.0)
    added = prefill(pace, 20_000)
    assert sum(1 for each in added[:12] if each > 2 * MOST_S) <= 6
