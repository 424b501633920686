"""The scorecard of `bench.gpu`: lines G1 to G23, each a workload, a limit in words, and cases that give limit, measured and baselines.

What lives here: the form of a line, of its rows and of their baselines, and the order of cases, so that a short budget has a row for every
line before any has its second. The lines themselves stand in gpu_attention, gpu_products, gpu_sampling, gpu_steps, gpu_offline and
gpu_serving.
"""

from __future__ import annotations

import importlib
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bench.gpu_clock import Clock, NotBuiltError

Work = Callable[[Clock], dict[str, Any]]
Step = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
LINES = tuple(f"G{number}" for number in range(1, 24))


@dataclass(frozen=True, slots=True)
class Line:
    """limit: its formula in words, of the rates of this run. floor, target: shares of it. cap_s: after so many seconds the line's further
    cases are left out."""

    name: str
    workload: str
    limit: str
    floor: float
    target: float
    cases: dict[str, Work]
    cap_s: float = 30.0


def steps_of(clock: Clock, lines: Iterable[Line]) -> list[Step]:
    """The first case of every line, then the second of every line, and so on. In a tiny run two cases of each function: at one
    size they are all the same."""
    spent: dict[str, float] = {}
    shown = [(line, list(line.cases) if not clock.is_tiny else _two_of_each(line)) for line in lines]
    ordered = sorted(
        ((at, order, line, case) for order, (line, cases) in enumerate(shown) for at, case in enumerate(cases)), key=lambda found: found[:2]
    )

    def run(line: Line, case: str) -> dict[str, Any]:
        if spent.get(line.name, 0.0) > line.cap_s and not clock.is_tiny:
            return {"left_out": f"{line.name} had its {line.cap_s:.0f} s"}
        start = time.monotonic()
        try:
            return line.cases[case](clock)
        finally:
            spent[line.name] = spent.get(line.name, 0.0) + time.monotonic() - start

    return [
        (
            {"case": f"{line.name} {case}", "line": line.name, "workload": line.workload, "limit": line.limit, "floor": line.floor}
            | {"target": line.target},
            lambda line=line, case=case: run(line, case),  # type: ignore[misc]
        )
        for _, _, line, case in ordered
    ]


def _two_of_each(line: Line) -> list[str]:
    seen: Counter[Any] = Counter()
    kept = []
    for case, work in line.cases.items():
        function = getattr(work, "func", work)
        seen[function] += 1
        if seen[function] <= 2:
            kept.append(case)
    return kept


def scored(limit_s: float, measured_s: float, baselines: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A row's figures. score: limit / measured, 1 is as fast as can be. baselines: seconds, or why there is none."""
    return {"limit_s": limit_s, "measured_s": measured_s, "score": limit_s / measured_s, "baselines": baselines or {}} | more


def timed(
    clock: Clock, baselines: dict[str, Callable[[], Callable[[], Any]]], *, in_graph: bool = True, cap_s: float = 25.0
) -> dict[str, Any]:
    """Seconds of each baseline, or the reason that it has none. Each is made first (compiled, laid out) and runs in a graph where it can be
    captured. cap_s: after so many seconds the rest is left out."""
    found: dict[str, Any] = {}
    start = time.monotonic()
    for name, make in baselines.items():
        if time.monotonic() - start > cap_s and not clock.is_tiny:
            found[name] = f"left out: the baselines of this case had their {cap_s:.0f} s"
            continue
        try:
            work = make()
            found[name] = clock.in_graph_s(work) if in_graph else clock.seconds(work)
        except Exception as error:  # a baseline that fails says so and is not our failure
            found[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return found


def found(module: str, name: str) -> Any:
    """Something of Braid's that may not be built yet. Raises: NotBuiltError."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise NotBuiltError(f"not built: {module}.{name}") from error
