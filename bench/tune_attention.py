"""Finds the lines of `kernels/attention/tiling.py` for the GPU at hand:

    python -m bench.tune_attention --phase decode --width 128 --budget 600

Times every candidate on every workload, prints the tables to paste, and how much each would change. A tile (keys, warps) and a split
decide in which order a row is summed, so they are chosen once a width, for all workloads together: the least mean of the slowdowns
against each workload's best. Stages change no bit, so each batch gets its own. Nothing is written: who pastes, looks.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import torch

from kernels.attention import cases, tiling
from kernels.attention import triton as attention
from kernels.attention.cases import AttentionCase

Timer = Callable[[Callable[[], Any]], float]
PHASES: tuple[tiling.Phase, ...] = ("decode", "prefill")
GROUPS = {64: (9, 3), 128: (32, 8), 256: (8, 2)}
"""Query and key/value heads of a workload, by head width: a small, a large and a hybrid model's."""
KEYS = {"decode": (32, 64, 128), "prefill": (32, 64, 128)}
WARPS = {"decode": (2, 4, 8), "prefill": (4, 8)}
ROWS = {"decode": (16,), "prefill": (64, 128)}
STAGES = {"decode": (3, 5, 7), "prefill": (2, 3, 4)}
SPLITS = (256, 512, 1024)


@dataclass(frozen=True, slots=True)
class Candidate:
    """split: keys a decode program reads; 0 for prefill."""

    rows: int
    keys: int
    num_warps: int
    split: int
    num_stages: int

    @property
    def order(self) -> tuple[int, int, int, int]:
        """What decides in which order a row is summed."""
        return (self.rows, self.keys, self.num_warps, self.split)


def candidates(phase: tiling.Phase) -> list[Candidate]:
    """In the order of what is likely good, so that a cut budget has tried those."""
    splits = SPLITS if phase == "decode" else (0,)
    found = [Candidate(*choice) for choice in itertools.product(ROWS[phase], KEYS[phase], WARPS[phase], splits, STAGES[phase])]
    return sorted(found, key=lambda one: (one.num_warps != (4 if phase == "decode" else 8), one.keys == 32, one.rows != 128))


def workloads(phase: tiling.Phase, width: int) -> list[AttentionCase]:
    heads = GROUPS[width]
    if phase == "prefill":
        steps = {1: ((4096, 4096),), 4: ((512, 2048),) * 4}
    else:
        steps = {1: ((1, 8192),), 8: ((1, 4096),) * 8, 64: ((1, 1024),) * 64, 256: ((1, 1024),) * 256}
    return [AttentionCase(f"{batch}", "", step, *heads, width) for batch, step in steps.items()]


@contextmanager
def using(candidate: Candidate) -> Iterator[None]:
    """The attention of `triton.py` with this tiling, whatever the tables say."""

    def chosen(group: int, *rest: object) -> tiling.Tiling:
        rows = max(candidate.rows, 1 << (group - 1).bit_length())
        return tiling.Tiling(rows, candidate.keys, candidate.num_warps, candidate.num_stages)

    stand_ins = {"decode_tiling": chosen, "prefill_tiling": chosen, "split_of": lambda *rest: candidate.split or 256}
    kept = {name: getattr(attention, name) for name in stand_ins}
    try:
        vars(attention).update(stand_ins)
        yield
    finally:
        vars(attention).update(kept)


def measure(
    work: Iterable[AttentionCase], choices: Iterable[Candidate], timer: Timer, device: str, end: float
) -> dict[tuple[str, Candidate], float]:
    """Seconds by (workload, candidate). A candidate that does not fit the chip has none; what comes after `end` is not tried."""
    times: dict[tuple[str, Candidate], float] = {}
    built = [(case, *cases.build(case, torch.bfloat16 if device == "cuda" else torch.float32, device)) for case in work]
    for candidate in choices:
        for case, q, kv in built:
            if time.monotonic() > end:
                return times
            with using(candidate):
                try:
                    times[case.name, candidate] = timer(partial(attention.attend, q, kv, case.spec))
                except Exception as error:  # out of shared memory or registers: the compiler says so in several classes
                    click.echo(f"left out: {candidate}: {type(error).__name__}", err=True)
                    break
    return times


def choose(times: dict[tuple[str, Candidate], float]) -> tuple[tuple[int, int, int, int], dict[str, Candidate]]:
    """(the order for all workloads, the best candidate of each workload that has it). Raises: ValueError where nothing ran everywhere."""
    names = sorted({name for name, _ in times}, key=int)
    best = {name: min(seconds for (of, _), seconds in times.items() if of == name) for name in names}

    def fastest(order: tuple[int, ...], name: str) -> tuple[float, Candidate] | None:
        found = [(seconds, one) for (of, one), seconds in times.items() if of == name and one.order == order]
        return min(found, key=lambda pair: pair[0], default=None)

    def slowdown(order: tuple[int, ...]) -> float:
        found = [fastest(order, name) for name in names]
        return sum(math.log(one[0] / best[name]) if one else math.inf for one, name in zip(found, names, strict=True))

    orders = {one.order for _, one in times}
    chosen = min(orders, key=slowdown, default=None)
    if chosen is None or slowdown(chosen) == math.inf:
        raise ValueError("no candidate ran on every workload: give a larger --budget")
    picked = {name: fastest(chosen, name) for name in names}
    return chosen, {name: one[1] for name, one in picked.items() if one is not None}


def lines(phase: tiling.Phase, width: int, times: dict[tuple[str, Candidate], float]) -> str:
    """What to paste, and beside it what it is worth."""
    (rows, keys, num_warps, split), picked = choose(times)
    text = [f'TILES["{phase}", 2]: Tile({width}, {rows}, {keys}, {num_warps})']
    if split:
        text.append(f"SPLITS: ({width}, {split})")
    for name, one in picked.items():
        best = min(seconds for (of, _), seconds in times.items() if of == name)
        text.append(
            f'STAGES["{phase}", 2]: Stages({width}, {name}, 0, {one.num_stages})'
            f"  # {times[name, one] * 1e6:.1f} us; the best of all {best * 1e6:.1f}"
        )
    return "\n".join(text)


@click.command()
@click.option("--phase", type=click.Choice([*PHASES, "all"]), default="all", show_default=True)
@click.option("--width", type=click.Choice([str(width) for width in GROUPS]), multiple=True, help="Head width; all by default.")
@click.option("--budget", type=click.FloatRange(10), default=3000, show_default=True, help="Seconds for everything.")
def main(phase: str, width: tuple[str, ...], budget: float) -> None:
    """Time candidates of attention's tiles on a GPU and print tables to paste."""
    from bench.gpu import graph_of, seconds

    todo = [(one, int(w)) for one in PHASES if phase in (one, "all") for w in (width or map(str, GROUPS))]
    click.echo(f"# {torch.cuda.get_device_name()}")
    for one, w in todo:
        end = time.monotonic() + budget / len(todo)
        times = measure(workloads(one, w), candidates(one), lambda work: seconds(graph_of(work)), "cuda", end)
        click.echo(lines(one, w, times))


if __name__ == "__main__":
    main()
