"""Where a request goes: to who knows it, within the bound, and few move when replicas come and go."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.deploy.affinity import Affinity
from service.deploy.routing import Loads, Ring, Routing

names = st.lists(st.integers(0, 500).map("r{}".format), min_size=1, max_size=24, unique=True)
keys = st.integers(0, 2**64 - 1)


@settings(deadline=None)
@given(names, st.lists(keys, min_size=1, max_size=20))
def test_a_walk_passes_every_replica_once(replicas: list[str], places: list[int]) -> None:
    ring = Ring(replicas)
    for place in places:
        assert sorted(ring.walk(place)) == sorted(replicas)


@settings(deadline=None)
@given(names.filter(lambda found: len(found) > 1), st.data())
def test_a_replica_that_goes_moves_only_its_own_keys(replicas: list[str], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(replicas))
    before, after = Ring(replicas), Ring(name for name in replicas if name != gone)
    for place in data.draw(st.lists(keys, min_size=1, max_size=50)):
        if (home := next(before.walk(place))) != gone:
            assert next(after.walk(place)) == home
        else:  # the next one takes it over: nobody else is asked to
            assert next(after.walk(place)) == list(before.walk(place))[1]


def test_shares_of_the_ring_are_alike() -> None:
    ring, rng = Ring(f"replica-{number}" for number in range(20)), random.Random(1)
    counts = dict.fromkeys(ring.names, 0)
    for _ in range(20_000):
        counts[next(ring.walk(rng.getrandbits(64)))] += 1
    assert max(counts.values()) < 1.5 * 1000
    assert min(counts.values()) > 0.6 * 1000


@settings(deadline=None)
@given(names, st.data())
def test_the_bound_holds_and_somebody_is_below_it(replicas: list[str], data: st.DataObject) -> None:
    loads = {name: data.draw(st.integers(0, 60)) for name in replicas}
    routing = Routing(bound=data.draw(st.floats(1.01, 3)), spare=data.draw(st.integers(0, 8)))
    affinity = Affinity(tuple(data.draw(st.lists(keys, min_size=1, max_size=4))))
    for name in data.draw(st.lists(st.sampled_from(replicas), max_size=4)):
        routing.record(affinity, name)
    preferred = routing.prefer(affinity, loads)
    assert loads[preferred] < routing.limit(loads)


@settings(deadline=None)
@given(names, st.lists(st.tuples(keys, st.integers(1, 5)), max_size=120))
def test_no_replica_gets_more_than_its_share_of_a_flood(replicas: list[str], requests: list[tuple[int, int]]) -> None:
    routing, loads = Routing(bound=1.25, spare=0), dict.fromkeys(replicas, 0)
    for number, (key, _) in enumerate(requests, 1):
        affinity = Affinity((key,))
        chosen = routing.prefer(affinity, loads)
        routing.record(affinity, chosen)
        loads[chosen] += 1
        assert loads[chosen] <= math.ceil(1.25 * number / len(replicas))


def test_the_longest_known_beginning_wins() -> None:
    routing, loads = Routing(), {"a": 0, "b": 3, "c": 0}
    routing.record(Affinity((1, 2)), "a")
    routing.record(Affinity((1, 2, 3)), "b")
    routing.record(Affinity((1,)), "c")
    assert routing.prefer(Affinity((1, 2, 3, 4)), loads) == "b"
    assert routing.prefer(Affinity((1, 9)), loads) in ("a", "c")


def test_of_those_that_know_it_equally_well_the_idle_one_is_taken() -> None:
    routing = Routing()
    for name in ("a", "b"):
        routing.record(Affinity((1,)), name)
    assert routing.prefer(Affinity((1,)), {"a": 5, "b": 2, "c": 0}) == "b"


def test_an_overloaded_or_full_replica_is_passed_by() -> None:
    routing = Routing(bound=1.25, spare=4)
    routing.record(Affinity((7,)), "a")
    assert routing.prefer(Affinity((7,)), {"a": 3, "b": 0, "c": 0}) == "a"
    assert routing.prefer(Affinity((7,)), {"a": 4, "b": 0, "c": 0}) in ("b", "c")
    assert routing.prefer(Affinity((7,)), {"a": 3, "b": 0, "c": 0}, full={"a"}) in ("b", "c")
    assert routing.prefer(Affinity((7,)), {"a": 3}, full={"a"}) == ""


def test_what_is_new_goes_to_the_same_place_whichever_router_it_meets() -> None:
    loads = dict.fromkeys("abcdefgh", 0)
    for place in range(0, 2**64, 2**59):
        assert Routing().prefer(Affinity((place, 1)), loads) == Routing().prefer(Affinity((place, 2)), loads)


def test_without_a_beginning_the_tenant_decides_and_without_a_tenant_nothing() -> None:
    loads = dict.fromkeys("abcdefgh", 0)
    homes = {Routing().prefer(Affinity(owner=owner * 2**60 + 1), loads) for owner in range(16)}
    assert len(homes) > 2
    assert Routing().prefer(Affinity(owner=5), loads) == Routing().prefer(Affinity(owner=5), loads)
    assert Routing().prefer(Affinity(), loads) == ""


def test_a_replica_that_must_answer_does_so_under_any_load_while_it_lives() -> None:
    wanted = Affinity((1,), replica="b")
    assert Routing().prefer(wanted, {"a": 0, "b": 999}) == "b"
    assert Routing().prefer(wanted, {"a": 0, "c": 0}) in ("a", "c")


def test_memory_is_bounded_and_the_oldest_go_first() -> None:
    routing, loads = Routing(num_remembered=10), {"a": 0, "b": 0}
    home = Routing().prefer(Affinity((0,)), loads)
    other = "b" if home == "a" else "a"
    routing.record(Affinity((0,)), other)
    assert routing.prefer(Affinity((0,)), loads) == other
    for key in range(1, 11):
        routing.record(Affinity((key,)), "a")
    assert routing.prefer(Affinity((0,)), loads) == home


def test_a_bound_that_prefers_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 1"):
        Routing(bound=1.0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.sampled_from(["sent", "ended"])), max_size=60))
def test_a_router_that_is_told_nothing_knows_its_own(steps: list[tuple[str, int, str]]) -> None:
    loads, open_requests = Loads(), set[tuple[str, int]]()
    loads.keep(set("abc"))
    for name, number, step in steps:
        getattr(loads, step)(name, str(number))
        (open_requests.add if step == "sent" else open_requests.discard)((name, number))
        assert loads.by_name == {each: sum(each == owner for owner, _ in open_requests) for each in "abc"}


def test_what_replicas_tell_counts_from_then_on() -> None:
    loads = Loads()
    loads.keep({"a", "b"})
    loads.sent("a", "1")
    loads.told("a", 5)
    loads.sent("a", "2")
    loads.ended("a", "1")
    assert loads.by_name == {"a": 5, "b": 0}
    loads.told("a", 0)  # told before our request had arrived there
    assert loads.by_name["a"] == 1
    loads.keep({"b"})
    loads.ended("a", "2")
    loads.told("a", 9)
    assert loads.by_name == {"b": 0}
