"""How many replicas are wanted: as many as the requests in flight and their K/V need, more at once, fewer only after a while.

Pure: stdlib only; time is an argument and what was wanted before is handed in and out. The autoscaling policy on a cluster and the
simulation in bench/ both run it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Goal:
    """requests: in flight in each replica, running or waiting. kv_use: share of K/V blocks in use, 0 to 1. low and high bound the number
    of replicas. calm_s: so long fewer must do before any is taken away. tolerance: smaller relative changes are not worth a start."""

    requests: float
    low: int = 1
    high: int = 1
    kv_use: float = 0.8
    calm_s: float = 300.0
    tolerance: float = 0.1


@dataclass(frozen=True, slots=True)
class Load:
    """replicas: that serve now. requests: in flight and queued, of all. kv_use: mean over the replicas, 0 to 1."""

    replicas: int
    requests: float
    kv_use: float = 0.0


Past = tuple[tuple[float, int], ...]
"""What was needed when (seconds, by any clock that only grows), oldest first."""


def needed(load: Load, goal: Goal) -> int:
    """Replicas for this load, within the bounds."""
    by_requests = load.requests / goal.requests
    by_kv = load.replicas * load.kv_use / goal.kv_use
    count = max(by_requests, by_kv)
    if load.replicas and abs(count / load.replicas - 1) <= goal.tolerance:
        count = load.replicas
    return min(max(math.ceil(count - 1e-9), goal.low), goal.high)


def decide(load: Load, goal: Goal, past: Sequence[tuple[float, int]], now: float) -> tuple[int, Past]:
    """The number of replicas that is wanted, and the past for the next call: the most that was needed within the last calm_s."""
    kept = [(when, count) for when, count in past if now - when < goal.calm_s]
    count = needed(load, goal)
    # What a later and greater need covers will never be the greatest again.
    while kept and kept[-1][1] <= count:
        kept.pop()
    kept.append((now, count))
    return min(max(kept[0][1], goal.low), goal.high), tuple(kept)
