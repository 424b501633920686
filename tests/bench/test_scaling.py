"""The simulated fleet: its clock, its cache and its measured machine, and that routing by prefix is worth what it is said to be."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import scaling
from bench.fleet import Ask, Crowd, Fleet, Machine, PrefixCache, Replica, Talk, measured_machine
from service.deploy.scaling import Goal

MACHINE = Machine(((1, 0.01), (5, 0.02)), token_s=0.001, start_s=5.0, kv_tokens=10_000, max_sequences=2, max_prefill_s=0.03)


def drain(replica: Replica) -> list[tuple[float, Ask]]:
    ended = []
    while (now := replica.next_event()) < float("inf"):
        ended += [(now, ask) for ask in replica.happen(now)]
    return ended


def ask(tokens: int, answer: int, key: int = 0) -> Ask:
    return Ask(((key or random.Random(tokens).getrandbits(32), tokens),), answer)


def test_the_machine_is_the_measured_one() -> None:
    machine = measured_machine(scaling.RESULTS)
    assert [count for count, _ in machine.decode_s] == [1, 4, 16, 32]
    steps = [machine.step_s(count) for count in range(1, 65)]
    assert steps == sorted(steps)
    assert machine.step_s(16) == dict(machine.decode_s)[16]
    assert 0 < machine.token_s < machine.step_s(1) < machine.start_s


def test_one_request_takes_its_prompt_and_its_steps() -> None:
    replica = Replica(MACHINE, 0.0)
    replica.add(ask(100, 10), 0.0)
    ((when, done),) = drain(replica)
    assert done.first_s == pytest.approx(0.11)  # a hundred tokens and a step
    assert when == pytest.approx(0.11 + 10 * 0.01)
    assert (replica.num_in_flight, replica.kv_used) == (0, 0)


def test_a_prompt_beside_an_answer_slows_both() -> None:
    replica = Replica(MACHINE, 0.0)
    replica.add(ask(100, 1000), 0.0)
    replica.happen(replica.next_event())
    began = 0.11
    late = ask(290, 1, key=5)
    late.arrived = began
    replica.add(late, began)
    drain(replica)
    # A step of 10 ms and 30 ms of prompt in turn: 0.3 s of reading take 0.4.
    assert late.first_s == pytest.approx(0.4)


def test_no_more_run_than_may() -> None:
    replica = Replica(MACHINE, 0.0)
    for number in range(1, 5):
        replica.add(ask(10, 50, key=number), 0.0)
    ended = drain(replica)
    assert len(ended) == 4
    firsts = sorted(done.first_s for _, done in ended)
    assert firsts[2] > ended[0][0]  # the third had to wait for a place


def test_the_cache_knows_beginnings_and_forgets_the_oldest() -> None:
    cache = PrefixCache(100)
    first = ((1, 50), (2, 10))
    assert cache.missing(first) == 60
    assert cache.missing(first) == 1
    assert cache.missing(((1, 50), (3, 10))) == 10
    assert cache.missing(((9, 10), (2, 10))) == 20  # known, but not behind this beginning
    assert cache.missing(((7, 90),)) == 90
    assert cache.missing(first) == 60


def test_conversations_go_on_with_all_that_was_said() -> None:
    crowd = Crowd(Talk(3, turns=1e9), seed=1)
    one = crowd.begin()
    two = crowd.go_on(one)
    assert two is not None
    assert two.parts[:2] == one.parts
    assert two.parts[2][1] == one.answer_tokens
    assert Crowd(Talk(3), seed=1).begin().parts == one.parts


def test_prefix_aware_routing_finds_more_and_answers_sooner() -> None:
    rows = {row["routing"]: row for row in scaling.compare(measured_machine(scaling.RESULTS), 8, 0.2, warm_s=30, measured_s=60)}
    ours, usual = rows["prefix-aware"], rows["least loaded of two"]
    assert ours["hit_share"] > usual["hit_share"] + 0.2
    assert ours["ttft_p50_s"] < 0.5 * usual["ttft_p50_s"]


def test_the_scaler_grows_shrinks_and_loses_nothing() -> None:
    talk = Talk(20)
    machine = measured_machine(scaling.RESULTS)
    fleet = scaling.start_fleet(machine, 2, talk, scaling.Routed(1, True, random.Random(1)), seed=3)
    fleet.arrive(lambda now: 3.0 if now < 120 else 1e-3)
    scaler = scaling.Scaler(fleet, Goal(requests=4, low=2, high=12, calm_s=30), machine.start_s)
    fleet.run(1200)
    counts = [count for _, count, _ in scaler.history]
    assert max(counts) > 4
    assert counts[-1] == 2
    assert sum(replica.num_in_flight for replica in fleet.replicas.values()) <= 2
    assert isinstance(fleet, Fleet)
    assert len(fleet.served) > 500


@pytest.mark.long
def test_the_command_writes_its_figures(tmp_path: Path) -> None:
    told = ["--quick", "--size", "4", "--rate", "0.2", "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    result = CliRunner().invoke(scaling.main, told)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.png").stat().st_size > 10_000
