"""A fleet of replicas on paper: how long a Braid server takes for what, its prefix cache, and conversations that come and go.

A discrete-event simulation. Between two events (a prompt is read, an answer ends, a request comes) every sequence of a replica advances
at one rate, so nothing happens per token and a thousand replicas fit on a laptop. Service times are measured ones, given as a `Machine`.
Called by `scaling`; routes and scales with the code that runs on a cluster.
"""

from __future__ import annotations

import heapq
import json
import random
from bisect import bisect
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from service.deploy.affinity import Affinity


@dataclass(frozen=True)
class Machine:
    """Of one replica. decode_s: seconds of a step by the number of sequences in it, between which is a straight line. token_s: of a
    prompt's token by itself. start_s: until a new replica takes requests. kv_tokens: that fit beside each other."""

    decode_s: tuple[tuple[int, float], ...]
    token_s: float
    start_s: float
    kv_tokens: int = 71_920
    max_sequences: int = 64
    max_prefill_s: float = 0.03

    def step_s(self, count: int) -> float:
        """Of a step that draws a token for each of so many sequences."""
        points = self.decode_s
        place = min(max(bisect(points, (count, float("inf"))), 1), len(points) - 1)
        (low, low_s), (high, high_s) = points[place - 1], points[place]
        return low_s + (count - low) * (high_s - low_s) / (high - low)


def measured_machine(results: Path, **more: Any) -> Machine:
    """From docs/results: medians of Braid's own runs in peers.json, and of first starts on a machine in startup.json."""
    found: dict[tuple[int, int], list[dict[str, float]]] = {}
    for run in json.loads((results / "peers.json").read_text())["runs"]:
        if run["server"] == "braid":
            found.setdefault((run["load"]["users"], run["load"]["input_len"]), []).append(run["figures"])
    longest = max(length for _, length in found)
    steps = sorted(
        (users, median(each["median_tpot_ms"] for each in figures) / 1e3) for (users, length), figures in found.items() if length < longest
    )
    token_s = median(each["median_ttft_ms"] for each in found[1, longest]) / 1e3 / longest
    start_s = json.loads((results / "startup.json").read_text())["int8"]["medians"]["first"]["ready_s"]
    return Machine(tuple(steps), token_s, start_s, **more)


@dataclass
class Ask:
    """One request. parts: of its prompt, as (digest of everything up to the part's end, tokens of the part)."""

    parts: tuple[tuple[int, int], ...]
    answer_tokens: int
    arrived: float = 0.0
    computed_tokens: int = 0
    first_s: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        return sum(tokens for _, tokens in self.parts)

    @property
    def affinity(self) -> Affinity:
        return Affinity(tuple(key for key, _ in self.parts))


class PrefixCache:
    """What a replica has read, oldest use first. A part counts only behind all parts before it."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._tokens: OrderedDict[int, int] = OrderedDict()
        self._total = 0

    def missing(self, parts: tuple[tuple[int, int], ...]) -> int:
        """Tokens that have to be computed; at least one. Mutates: all parts are known afterwards, and the oldest forgotten."""
        known, has_missed = 0, False
        for key, tokens in parts:
            has_missed = has_missed or key not in self._tokens
            known += 0 if has_missed else tokens
            if key not in self._tokens:
                self._total += tokens
            self._tokens[key] = tokens
        for key, _ in reversed(parts):  # the beginning is the last to go
            self._tokens.move_to_end(key)
        while self._total > self._capacity:
            self._total -= self._tokens.popitem(last=False)[1]
        return max(sum(tokens for _, tokens in parts) - known, 1)


class Replica:
    """Prompts are read one after another, beside steps that draw for those that have been read: a step with a part of a prompt in it takes
    as much longer as --max-prefill-ms allows, as the server does it."""

    def __init__(self, machine: Machine, now: float) -> None:
        self.num_in_flight = 0
        self.num_served = 0
        self.kv_used = 0
        self.version = 0  # of what was announced to the clock; an older announcement is void
        self._machine = machine
        self._now = now
        self._cache = PrefixCache(machine.kv_tokens)
        self._steps = 0.0  # that every running sequence has made
        self._running: list[tuple[float, int, Ask]] = []  # by the step that ends it
        self._prompts: deque[Ask] = deque()
        self._left_s = 0.0  # of the prompt in hand, read by itself

    def add(self, ask: Ask, now: float) -> None:
        self._advance(now)
        self.num_in_flight += 1
        self.num_served += 1
        self._prompts.append(ask)
        if len(self._prompts) == 1:
            self._begin()

    def next_event(self) -> float:
        """When something will have happened, if nobody comes until then; infinite for never."""
        reading_s, step_s = self._pace()
        when = self._left_s / reading_s if self._is_reading() else float("inf")
        if self._running:
            when = min(when, (self._running[0][0] - self._steps) * step_s)
        return self._now + max(when, 0.0)

    def happen(self, now: float) -> list[Ask]:
        """What has happened by now; the answers that have ended."""
        self._advance(now)
        ended = []
        while self._running and self._running[0][0] <= self._steps + 1e-6:
            ask = heapq.heappop(self._running)[2]
            self.num_in_flight -= 1
            self.kv_used -= ask.prompt_tokens + ask.answer_tokens
            ended.append(ask)
        if self._is_reading() and self._left_s <= 1e-9:
            ask = self._prompts.popleft()
            ask.first_s = now - ask.arrived
            heapq.heappush(self._running, (self._steps + ask.answer_tokens, id(ask), ask))
            self._left_s = 0.0
            self._begin()
        elif self._left_s == 0.0:
            self._begin()  # there is a place again
        return ended

    def _begin(self) -> None:
        if self._prompts and len(self._running) < self._machine.max_sequences:
            ask = self._prompts[0]
            ask.computed_tokens = self._cache.missing(ask.parts)
            self.kv_used += ask.prompt_tokens + ask.answer_tokens
            self._left_s = ask.computed_tokens * self._machine.token_s + self._machine.step_s(1)

    def _is_reading(self) -> bool:
        return self._left_s > 0.0

    def _pace(self) -> tuple[float, float]:
        """The share of time in which a prompt is read, and seconds from step to step."""
        if not self._running:
            return 1.0, 0.0
        step_s = self._machine.step_s(len(self._running))
        if not self._is_reading():
            return 1.0, step_s
        extra_s = max(self._machine.max_prefill_s, step_s)
        return extra_s / (step_s + extra_s), step_s + extra_s

    def _advance(self, now: float) -> None:
        reading_s, step_s = self._pace()
        passed = now - self._now
        if self._is_reading():
            self._left_s = max(self._left_s - passed * reading_s, 1e-12)
        if self._running:
            self._steps += passed / step_s
        self._now = now


@dataclass(frozen=True)
class Talk:
    """How people talk: each conversation begins with one of num_systems system messages, few of which are much used (Zipf), and goes on
    for some turns with pauses. Means; lengths in tokens, pauses in seconds."""

    num_systems: int
    system_tokens: tuple[int, int] = (256, 2048)
    question_tokens: tuple[int, int] = (20, 180)
    answer_tokens: tuple[int, int] = (32, 224)
    turns: float = 4.0
    pause_s: float = 10.0


class Crowd:
    """Conversations. rng: of everything about them, so that two runs with equal seeds ask the same."""

    def __init__(self, talk: Talk, seed: int) -> None:
        self._talk = talk
        self._rng = random.Random(seed)
        self._systems = [(self._rng.getrandbits(64), self._rng.randint(*talk.system_tokens)) for _ in range(talk.num_systems)]
        self._weights = list(accumulate(1 / rank for rank in range(1, talk.num_systems + 1)))

    def pause(self, mean_s: float) -> float:
        return self._rng.expovariate(1 / mean_s)

    def begin(self) -> Ask:
        place = bisect(self._weights, self._rng.random() * self._weights[-1])
        return self._turn((self._systems[place],))

    def go_on(self, last: Ask) -> Ask | None:
        """The next turn of a conversation, None where it is over."""
        if self._rng.random() < 1 / self._talk.turns:
            return None
        return self._turn((*last.parts, (self._rng.getrandbits(64), last.answer_tokens)))

    def _turn(self, parts: tuple[tuple[int, int], ...]) -> Ask:
        question = (self._rng.getrandbits(64), self._rng.randint(*self._talk.question_tokens))
        return Ask((*parts, question), self._rng.randint(*self._talk.answer_tokens))


@dataclass
class Fleet:
    """Replicas by name and the clock that moves them. choose: a replica for a request."""

    machine: Machine
    crowd: Crowd
    talk: Talk
    choose: Callable[[Ask], str]
    on_end: Callable[[Ask, str], None] = lambda ask, name: None
    now: float = 0.0
    replicas: dict[str, Replica] = field(default_factory=dict)
    served: list[Ask] = field(default_factory=list)
    _clock: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _number: int = 0

    def at(self, when: float, act: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._clock, (when, self._number, act))

    def run(self, until_s: float) -> None:
        while self._clock and self._clock[0][0] <= until_s:
            self.now, _, act = heapq.heappop(self._clock)
            act()
        self.now = until_s

    def arrive(self, rate: Callable[[float], float]) -> None:
        """New conversations for ever. rate: a second, by the time."""

        def come() -> None:
            self.ask(self.crowd.begin())
            self.at(self.now + self.crowd.pause(1 / rate(self.now)), come)

        self.at(self.now + self.crowd.pause(1 / rate(self.now)), come)

    def ask(self, ask: Ask) -> None:
        ask.arrived = self.now
        name = self.choose(ask)
        self.replicas[name].add(ask, self.now)
        self._announce(name, self.replicas[name])

    def _announce(self, name: str, replica: Replica) -> None:
        replica.version += 1
        version, when = replica.version, replica.next_event()

        def happen() -> None:
            if replica.version != version:
                return
            for ask in replica.happen(self.now):
                self._end(ask, name)
            self._announce(name, replica)

        if when < float("inf"):
            self.at(when, happen)

    def _end(self, ask: Ask, name: str) -> None:
        self.served.append(ask)
        self.on_end(ask, name)
        following = self.crowd.go_on(ask)
        if following is not None:
            self.at(self.now + self.crowd.pause(self.talk.pause_s), lambda: self.ask(following))
