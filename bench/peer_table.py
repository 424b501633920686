"""What runs of several servers come to: which count, and their table. Plain values, no server and no clock. Called by `bench.peers`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from bench.peer_list import BRAID, BRAID_INT4

MOST_DIFFERENCE = 0.10  # of two probes, beyond which the run between them is void


@dataclass(frozen=True)
class Load:
    """What a run sends. Lengths in tokens. An answer of a token or two makes it a prefill: then the time to the first token is what
    counts."""

    users: int
    prompts: int
    input_len: int
    output_len: int

    @property
    def is_prefill(self) -> bool:
        return self.output_len <= 2

    @property
    def name(self) -> str:
        if self.is_prefill:
            return f"prefill of {self.input_len:,}"
        return f"{self.users} user{'s' if self.users > 1 else ''}"


@dataclass
class Run:
    """One server under one load, once. probes: before and after. figures: what the load generator wrote. failed: why there are none, or
    why they are not those of the load."""

    round: int
    server: str
    load: Load
    attempt: int = 0
    probes: list[dict[str, float]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    failed: str = ""

    @property
    def is_void(self) -> bool:
        return differ(*self.probes)

    @property
    def counts(self) -> bool:
        return not (self.failed or self.is_void)

    @property
    def rate(self) -> float:
        """Tokens a second: of a prefill the prompt's, by the time to the first token; of other loads the answers'."""
        if not self.load.is_prefill:
            return float(self.figures["output_throughput"])
        return float(self.figures["total_input_tokens"] / self.figures["completed"] / self.figures["median_ttft_ms"] * 1e3)

    def told(self) -> dict[str, Any]:
        return {**asdict(self), "void": self.is_void}


def differ(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Was the machine another one after the run? In either respect by more than a tenth of the greater figure."""
    return any(abs(before[name] - after[name]) > MOST_DIFFERENCE * max(before[name], after[name]) for name in before)


def shortfall(figures: Mapping[str, Any], load: Load) -> str:
    """Why these are not the figures of the load, as less work is no speed; "" when they are."""
    if figures["completed"] < load.prompts:
        return f"{figures['completed']} of {load.prompts} requests completed: {figures.get('errors', '')}"
    wanted = load.prompts * load.output_len
    if abs(figures["total_output_tokens"] - wanted) > 0.02 * wanted:
        return f"{figures['total_output_tokens']} tokens came instead of {wanted}"
    return ""


def tell(run: Run) -> str:
    result = run.failed or f"{run.rate:.1f} tokens/s"
    return f"round {run.round}  {run.server:<22} {run.load.name:<16} {result}{'  void' if run.is_void else ''}"


def table(runs: Sequence[Run]) -> str:
    """Markdown: of each load and server the medians over the runs that count, and how much faster Braid was."""
    lines = ["| load | server | tokens/s | TTFT p50 | TPOT p50 | Braid is | runs that count |", "|---|---|---|---|---|---|---|"]
    closing = []
    for load in dict.fromkeys(run.load for run in runs):
        mine = [run for run in runs if run.load == load]
        by_server = {name: [run for run in mine if run.server == name] for name in dict.fromkeys(run.server for run in mine)}
        rates = {name: rate for name, each in by_server.items() if (rate := median_rate(each)) is not None}
        for name in sorted(by_server, key=lambda name: (name != BRAID, -rates.get(name, 0.0))):
            lines.append(table_row(load, name, by_server[name], rates))
        peers = {name: rate for name, rate in rates.items() if name not in (BRAID, BRAID_INT4)}
        if BRAID in rates and peers:
            best = max(peers, key=lambda name: peers[name])
            closing.append(f"- {load.name}: {rates[BRAID] / peers[best]:.2f} x the best of the others ({best})")
    return "\n".join([*lines, "", *closing])


def table_row(load: Load, name: str, runs: Sequence[Run], rates: Mapping[str, float]) -> str:
    good = [run for run in runs if run.counts]
    counted = f"{len(good)} of {len(runs)}"
    if not good:
        return f"| {load.name} | {name} | - | - | - | - | {counted} |"
    ttft, tpot = (statistics.median(run.figures[f"median_{key}_ms"] for run in good) for key in ("ttft", "tpot"))
    ratio = f"{rates[BRAID] / rates[name]:.2f} x" if BRAID in rates and name != BRAID else ""
    shown_tpot = "" if load.is_prefill else f"{tpot:.1f} ms"
    return f"| {load.name} | {name} | {rates[name]:,.1f} | {ttft:,.0f} ms | {shown_tpot} | {ratio} | {counted} |"


def median_rate(runs: Sequence[Run]) -> float | None:
    good = [run.rate for run in runs if run.counts]
    return statistics.median(good) if good else None


def read_runs(report: Mapping[str, Any]) -> list[Run]:
    known = {field.name for field in fields(Run)}
    return [Run(**{**{key: value for key, value in run.items() if key in known}, "load": Load(**run["load"])}) for run in report["runs"]]
