"""How many replicas are wanted: enough at once, fewer only after a calm time, and no twitching."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.deploy.policy import ScalingPolicy
from service.deploy.scaling import Goal, Load, Past, decide, needed

GOAL = Goal(requests=10, low=1, high=100, calm_s=60)
loads = st.builds(Load, st.integers(0, 100), st.floats(0, 5000), st.floats(0, 1))


@settings(deadline=None)
@given(loads, st.integers(0, 5), st.integers(5, 100))
def test_the_bounds_hold(load: Load, low: int, high: int) -> None:
    goal = Goal(requests=10, low=low, high=high)
    assert low <= needed(load, goal) <= high
    assert low <= decide(load, goal, ((0.0, 9999),), 1.0)[0] <= high


@settings(deadline=None)
@given(loads)
def test_it_is_enough(load: Load) -> None:
    """Within the tolerance, and where the bounds allow."""
    count = needed(load, GOAL)
    assert count * GOAL.requests * 1.1 + 1e-6 >= load.requests or count == GOAL.high
    assert count * 1.1 + 1e-6 >= load.replicas * load.kv_use / GOAL.kv_use or count == GOAL.high


def test_keys_and_values_count_where_requests_are_few() -> None:
    assert needed(Load(4, requests=8, kv_use=1.0), GOAL) == 5
    assert needed(Load(4, requests=8, kv_use=0.2), GOAL) == 1


def test_small_changes_are_left_alone() -> None:
    assert needed(Load(20, requests=215), GOAL) == 20
    assert needed(Load(20, requests=225), GOAL) == 23
    assert needed(Load(20, requests=185), GOAL) == 20


def test_more_at_once_fewer_after_the_calm() -> None:
    past: Past = ()
    seen = []
    for second, requests in [(0, 10), (10, 400), (20, 30), (60, 30), (69, 30), (70, 30), (100, 30)]:
        count, past = decide(Load(10, requests), GOAL, past, float(second))
        seen.append(count)
    assert seen == [1, 40, 40, 40, 40, 3, 3]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 40), st.floats(0, 3000)), min_size=1, max_size=40))
def test_what_is_wanted_is_the_most_that_was_needed_lately(steps: list[tuple[float, float]]) -> None:
    past: Past = ()
    now, history = 0.0, list[tuple[float, int]]()
    for pause, requests in steps:
        now += pause
        load = Load(0, requests)
        history.append((now, needed(load, GOAL)))
        count, past = decide(load, GOAL, past, now)
        assert count == max(each for when, each in history if now - when < GOAL.calm_s)
        assert len(past) <= len(history)


class Context:
    """What Ray's controller hands to a policy."""

    capacity_adjusted_min_replicas, capacity_adjusted_max_replicas = 1, 8
    current_num_replicas = 2

    def __init__(self, requests: float, shares: dict[str, float], state: dict[str, object], now: float) -> None:
        self.total_num_requests = requests
        self.aggregated_metrics = {"kv_use": shares} if shares else None
        self.policy_state = state
        self.current_time = now


def test_the_policy_of_the_cluster_keeps_its_past_in_rays_hands() -> None:
    policy = ScalingPolicy(requests=4, kv_use=0.8, calm_s=60)
    count, state = policy(Context(20, {"a": 0.1, "b": 0.3}, {}, 100.0))
    assert count == 5
    count, state = policy(Context(0, {}, state, 130.0))
    assert count == 5
    count, state = policy(Context(0, {}, state, 161.0))
    assert count == 1
    assert policy(Context(0, {"a": 1.0, "b": 1.0}, {}, 0.0))[0] == 3


@pytest.mark.parametrize("requests", [0.5, 1, 7, 10, 11, 95, 101])
def test_from_nothing_it_is_what_the_requests_need(requests: float) -> None:
    assert needed(Load(0, requests), GOAL) == max(1, math.ceil(requests / 10))
