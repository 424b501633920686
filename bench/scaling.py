"""Routing and scaling of many replicas, simulated with measured service times: docs/scaling.md's figures.

    python -m bench.scaling --json docs/results/scaling.json --plot docs/images/scaling.png          minutes; --quick for seconds

Compares ways to choose a replica at 10, 100 and 1,000 of them, and what the scaling policy makes of a load that changes. Service times
come from docs/results (peers.json, startup.json), the model of a replica from `fleet`, the rules from service/deploy as they are.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bench.fleet import Ask, Crowd, Fleet, Machine, Replica, Talk, measured_machine
from bench.probe import describe_machine
from service.deploy.routing import Loads, Routing
from service.deploy.scaling import Goal, Load, Past, decide

RESULTS = Path(__file__).parent.parent / "docs" / "results"
SIZES = (10, 100, 1000)
RATES = (0.1, 0.3)  # conversations a second and replica, of four turns each
SYSTEMS = 10  # system messages a replica
GOAL_TTFT_S = 2.0
LOOK_S = 5.0  # between two decisions on the number of replicas
NUM_ASKED = 4  # replicas, at most
Choice = Callable[[Fleet, Ask], str]


def round_robin() -> Choice:
    count = 0

    def choose(fleet: Fleet, ask: Ask) -> str:
        nonlocal count
        count += 1
        names = tuple(fleet.replicas)
        return names[count % len(names)]

    return choose


def two_choices(rng: random.Random) -> Choice:
    """The less loaded of two at random, as Ray Serve does by itself."""

    def choose(fleet: Fleet, ask: Ask) -> str:
        names = tuple(fleet.replicas)
        return min(rng.sample(names, min(2, len(names))), key=lambda name: fleet.replicas[name].num_in_flight)

    return choose


class Routed:
    """Braid's own routing. gates: routers that share nothing, each of which gets its part of the requests. remembers: whether they learn
    who has read what, or hash alone decides. tell_s: so often replicas tell every gate how many requests they have; 0: never, so that a
    gate knows its own alone. asks: a gate asks the replica that it prefers before it sends."""

    def __init__(self, gates: int, remembers: bool, rng: random.Random, tell_s: float = 5.0, asks: bool = False) -> None:
        self.gates = [(Routing(), Loads()) for _ in range(gates)]
        self._remembers = remembers
        self._rng = rng
        self._tell_s = tell_s
        self._asks = asks
        self._told_at = 0.0
        self._sent: dict[int, Loads] = {}

    def __call__(self, fleet: Fleet, ask: Ask) -> str:
        if self._tell_s and fleet.now >= self._told_at + self._tell_s:
            self._tell(fleet)
        routing, known = self._rng.choice(self.gates)
        known.keep(fleet.replicas.keys())
        loads = known.by_name
        for _ in range(NUM_ASKED if self._asks else 1):
            name = routing.prefer(ask.affinity, loads) or self._rng.choice(tuple(loads))
            if self._asks:
                known.told(name, fleet.replicas[name].num_in_flight)
                if loads[name] < routing.limit(loads):
                    break
        if self._remembers:
            routing.record(ask.affinity, name)
        known.sent(name, str(id(ask)))
        self._sent[id(ask)] = known
        return name

    def on_end(self, ask: Ask, name: str) -> None:
        self._sent.pop(id(ask)).ended(name, str(id(ask)))

    def _tell(self, fleet: Fleet) -> None:
        self._told_at = fleet.now
        for _, known in self.gates:
            for name, replica in fleet.replicas.items():
                known.told(name, replica.num_in_flight)


def choices(seed: int) -> dict[str, Choice]:
    return {
        "round robin": round_robin(),
        "least loaded of two": two_choices(random.Random(seed)),
        "hash, bounded": Routed(1, False, random.Random(seed)),
        "prefix-aware": Routed(1, True, random.Random(seed)),
        "16 gates that ask": Routed(16, True, random.Random(seed), asks=True),
        "16 gates that are told": Routed(16, True, random.Random(seed)),
        "16 blind gates": Routed(16, True, random.Random(seed), tell_s=0.0),
    }


def start_fleet(machine: Machine, size: int, talk: Talk, choice: Choice, seed: int) -> Fleet:
    fleet = Fleet(machine, Crowd(talk, seed), talk, lambda ask: choice(fleet, ask))
    if isinstance(choice, Routed):
        fleet.on_end = choice.on_end
    fleet.replicas = {f"r{number}": Replica(machine, 0.0) for number in range(size)}
    return fleet


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else math.nan


def figures_of(served: list[Ask]) -> dict[str, float]:
    firsts = [ask.first_s for ask in served]
    prompt = sum(ask.prompt_tokens for ask in served)
    return {
        "requests": len(served),
        "hit_share": 1 - sum(ask.computed_tokens for ask in served) / max(prompt, 1),
        "ttft_p50_s": quantile(firsts, 0.5),
        "ttft_p99_s": quantile(firsts, 0.99),
        "in_time_share": sum(first <= GOAL_TTFT_S for first in firsts) / max(len(firsts), 1),
    }


def compare(machine: Machine, size: int, rate: float, warm_s: float, measured_s: float) -> list[dict[str, Any]]:
    """Every way to choose, the same conversations."""
    rows = []
    for name, choice in choices(seed=1).items():
        began = time.perf_counter()
        fleet = start_fleet(machine, size, Talk(SYSTEMS * size), choice, seed=size)
        fleet.arrive(lambda _: rate * size)
        fleet.run(warm_s)
        fleet.served.clear()
        before = {key: replica.num_served for key, replica in fleet.replicas.items()}
        fleet.run(warm_s + measured_s)
        counts = [replica.num_served - before[key] for key, replica in fleet.replicas.items()]
        row = {
            "replicas": size,
            "rate": rate,
            "routing": name,
            **figures_of(fleet.served),
            "imbalance": max(counts) / max(statistics.fmean(counts), 1e-9),
            "in_flight_at_end": sum(replica.num_in_flight for replica in fleet.replicas.values()),
        }
        rows.append(row)
        click.echo(
            f"{size:5} x {rate:.2f}/s {name:24} hits {row['hit_share']:6.1%}  TTFT p50 {row['ttft_p50_s']:8.3f} s"
            f"  p99 {row['ttft_p99_s']:8.3f} s"
            f"  in time {row['in_time_share']:6.1%}  imbalance {row['imbalance']:.2f}  ({time.perf_counter() - began:.0f} s)"
        )
    return rows


class Scaler:
    """Looks at the fleet now and then, starts replicas that come after start_s, and lets others finish and go."""

    def __init__(self, fleet: Fleet, goal: Goal, start_s: float) -> None:
        self.history: list[tuple[float, int, int]] = []  # time, replicas that are paid for, requests in flight
        self._fleet = fleet
        self._goal = goal
        self._start_s = start_s
        self._past: Past = ()
        self._starting = 0
        self._leaving: dict[str, Replica] = {}
        self._number = len(fleet.replicas)
        fleet.at(LOOK_S, self._look)

    def _look(self) -> None:
        fleet = self._fleet
        self._leaving = {name: replica for name, replica in self._leaving.items() if replica.num_in_flight}
        here = fleet.replicas
        requests = sum(replica.num_in_flight for replica in here.values())
        kv_use = statistics.fmean(replica.kv_used / fleet.machine.kv_tokens for replica in here.values())
        wanted, self._past = decide(Load(len(here), requests, min(kv_use, 1.0)), self._goal, self._past, fleet.now)
        for _ in range(wanted - len(here) - self._starting):
            self._starting += 1
            fleet.at(fleet.now + self._start_s, self._come)
        for name in sorted(here, key=lambda name: here[name].num_in_flight)[: max(len(here) - wanted, 0)]:
            self._leaving[name] = here.pop(name)
        self.history.append((fleet.now, len(here) + self._starting + len(self._leaving), requests))
        fleet.at(fleet.now + LOOK_S, self._look)

    def _come(self) -> None:
        self._starting -= 1
        self._number += 1
        self._fleet.replicas[f"r{self._number}"] = Replica(self._fleet.machine, self._fleet.now)


def day(now: float, length_s: float, peak: float) -> float:
    """Conversations a second: a quiet night, a busy day, and in the evening a minute and a half of three times as much."""
    base = peak * (0.1 + 0.9 * math.sin(math.pi * now / length_s) ** 2)
    return max(3 * base if 0.75 < now / length_s < 0.775 else base, 1e-3)


def scale(machine: Machine, length_s: float, peak: float, high: int) -> list[dict[str, Any]]:
    goal = Goal(requests=4.0, low=2, high=high, calm_s=180.0)
    plans: list[tuple[str, Goal, float]] = [
        ("as many as there can be", dataclasses.replace(goal, low=high), machine.start_s),
        ("4 requests each", goal, machine.start_s),
        ("8 requests each", dataclasses.replace(goal, requests=8.0), machine.start_s),
        ("4 each, start in 60 s", goal, 60.0),
        ("4 each, no calm", dataclasses.replace(goal, calm_s=LOOK_S), machine.start_s),
    ]
    rows = []
    for name, wanted, start_s in plans:
        fleet = start_fleet(machine, wanted.low, Talk(SYSTEMS * 20), Routed(1, True, random.Random(1)), seed=7)
        fleet.arrive(lambda now: day(now, length_s, peak))
        scaler = Scaler(fleet, wanted, start_s)
        fleet.run(length_s)
        counts = [count for _, count, _ in scaler.history]
        row = {"policy": name, **figures_of(fleet.served), "start_s": start_s, "mean_replicas": statistics.fmean(counts)}
        row |= {"most_replicas": max(counts), "changes": sum(a != b for a, b in itertools.pairwise(counts))}
        rows.append({**row, "history": scaler.history[::4]})
        click.echo(
            f"{name:28} replicas mean {row['mean_replicas']:5.1f} most {max(counts):3}  TTFT p50 {row['ttft_p50_s']:.3f} s "
            f"p99 {row['ttft_p99_s']:.3f} s  in time {row['in_time_share']:.1%}  hits {row['hit_share']:.1%}  changes {row['changes']}"
        )
    return rows


def plot(routing: list[dict[str, Any]], scaling: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    rate = max(row["rate"] for row in routing)
    for index, (key, label) in enumerate((("hit_share", "prompt tokens cached"), ("ttft_p99_s", "TTFT p99, s"))):
        axes = figure.add_subplot(1, 3, index + 1)
        for name in dict.fromkeys(row["routing"] for row in routing):
            rows = [row for row in routing if row["routing"] == name and row["rate"] == rate]
            axes.plot([row["replicas"] for row in rows], [row[key] for row in rows], marker=".", label=name)
        axes.set(xlabel="replicas", title=f"{label}, at {rate:g} conversations/s each", xscale="log")
        axes.title.set_fontsize(9)
        if key != "hit_share":
            axes.set_yscale("log")
    axes = figure.add_subplot(1, 3, 3)
    for row in scaling:
        axes.plot([when / 60 for when, _, _ in row["history"]], [count for _, count, _ in row["history"]], label=row["policy"])
    axes.set(xlabel="minutes", title="replicas under a load that changes")
    axes.title.set_fontsize(9)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=100)


@click.command(context_settings={"show_default": True})
@click.option("--size", "sizes", multiple=True, type=click.IntRange(1), default=SIZES, help="Replicas; repeatable.")
@click.option("--rate", "rates", multiple=True, type=click.FloatRange(0, min_open=True), default=RATES, help="Conversations/s and replica.")
@click.option("--quick", is_flag=True, help="A tenth of the time, and at most 100 replicas.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path))
def main(sizes: tuple[int, ...], rates: tuple[float, ...], quick: bool, json_path: Path | None, plot_path: Path | None) -> None:
    """Simulate routing and scaling of many replicas."""
    machine = measured_machine(RESULTS)
    part = 0.1 if quick else 1.0
    routing = [
        row
        for rate in rates
        for size in sizes
        if size <= 100 or not quick
        for row in compare(machine, size, rate, warm_s=60 * part, measured_s=120 * part)
    ]
    scaling = scale(machine, length_s=3600 * part, peak=4.0, high=20)
    if json_path is not None:
        source = json.loads((RESULTS / "peers.json").read_text())["machine"]
        report = {"service_times_of": source, "simulated_on": describe_machine(), "replica": dataclasses.asdict(machine)}
        report |= {"talk": dataclasses.asdict(Talk(SYSTEMS)), "goal_ttft_s": GOAL_TTFT_S, "routing": routing, "scaling": scaling}
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    if plot_path is not None:
        plot(routing, scaling, plot_path)


if __name__ == "__main__":
    main()
