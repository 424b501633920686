"""What each choice of the CPU back end is worth: a step of SmolLM2-135M's shape with everything, and with one thing taken away.

    python -m bench.cpu_ablations --json ablations.json

Random weights, no server and no scheduler. All arms run in turn, several rounds, so that a slow minute is everybody's; what is told is the
median over the rounds of an arm's time over that of the whole back end in the same round. Above 1 is what the choice saves.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from torch import Tensor

from bench.cpu_step import BLOCK_SIZE, Model, Shape, batch_of
from bench.probe import describe_machine, read_bandwidth
from kernels.compose import FineOps, compose
from kernels.cpu.ops import cpu_ops
from kernels.cpu.packed import linear_floats, pack_floats
from kernels.ops import Int8Weight, Ops, SampleRows, Weight
from kernels.reference_ops import REFERENCE_FINE_OPS

CONTEXT = 200
TINY = Shape(layers=2, width=64, heads=4, kv_heads=2, head_width=16, wide=96, vocab_size=500)


@dataclass(frozen=True, slots=True)
class Workload:
    """Equal sequences that compute `length` tokens each behind `start` others."""

    name: str
    num_sequences: int
    length: int
    start: int


WORKLOADS = (
    Workload("1 decode", 1, 1, CONTEXT - 1),
    Workload("4 decodes", 4, 1, CONTEXT - 1),
    Workload("16 decodes", 16, 1, CONTEXT - 1),
    Workload("prompt of 512", 1, 512, 0),
)


def unfused(ops: Ops) -> Ops:
    """The same kernels, one call for each."""
    fine = FineOps(ops.attend, ops.linear, ops.embed, ops.rms_norm, ops.kv_write, ops.gated, ops.experts, ops.sample, ops.pack)
    return compose("cpu, unfused", fine)


def with_torch_products(ops: Ops) -> Ops:
    """Rows of int8 as PyTorch multiplies them fastest: as float32, whose sums are as exact."""

    def linear(x: Tensor, weight: Weight) -> Tensor:
        if isinstance(weight, Int8Weight) and isinstance(weight.packed, tuple):
            return linear_floats(x, weight, weight.packed)
        return ops.linear(x, weight)

    def pack(weight: Weight) -> Weight:
        return pack_floats(weight) if isinstance(weight, Int8Weight) else weight

    fine = FineOps(ops.attend, linear, REFERENCE_FINE_OPS.embed, ops.rms_norm, ops.kv_write, ops.gated, ops.experts, ops.sample, pack)
    return compose("cpu, torch's products", fine)


class Arms:
    """What is measured, by name: the models share nothing, so that no arm leaves another's weights in a cache."""

    def __init__(self, shape: Shape, num_threads: int) -> None:
        torch.manual_seed(0)
        whole = cpu_ops("", num_threads)
        blocks = 1 + max(work.num_sequences * -(-(work.start + work.length) // BLOCK_SIZE) for work in WORKLOADS)
        self.shape = shape
        self.models = {
            "everything": Model(whole, blocks, shape),
            "layers not fused: a call for each kernel": Model(unfused(whole), blocks, shape),
            "layers in calls of their own, three each": Model(replace(whole, stack=None), blocks, shape),
            "head not fused: all logits written": Model(replace(whole, draw=unfused(whole).draw), blocks, shape),
            "products by PyTorch, unpacked (float32)": Model(with_torch_products(whole), blocks, shape),
            "attention by PyTorch, sequence by sequence": Model(replace(whole, attend=REFERENCE_FINE_OPS.attend), blocks, shape),
            "keys as rows in the pool": Model(whole, blocks, shape, has_columns=False),
            "K/V in bfloat16": Model(whole, blocks, shape, kv_dtype=torch.bfloat16),
            "one thread": Model(cpu_ops("", 1), blocks, shape),
            "threads that park at once": Model(cpu_ops("", num_threads, spin_us=0), blocks, shape),
            "weights of 4 bits in groups (int4)": Model(whole, blocks, shape, bits=4),
        }

    def steps(self, work: Workload) -> dict[str, Callable[[], object]]:
        batch, positions = batch_of(work.num_sequences, work.length, work.start)
        ids = torch.randint(self.shape.vocab_size, (len(positions),))
        sampled = batch.query_start[1:].long() - 1
        zeros, ones = torch.zeros(len(sampled)), torch.ones(len(sampled))
        rows = SampleRows(zeros, zeros.int(), ones, zeros, zeros.long(), zeros.long())

        def step_of(model: Model) -> Callable[[], object]:
            return lambda: model.draw(ids, positions, batch, sampled, rows)

        return {name: step_of(model) for name, model in self.models.items()}


def milliseconds(call: Callable[[], object], seconds: float) -> float:
    """Median of the calls that fit, three at least, after one that is not counted."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


@click.command(context_settings={"show_default": True})
@click.option("--rounds", type=click.IntRange(1), default=5)
@click.option("--seconds", type=click.FloatRange(0), default=0.4, help="Of each arm in each round.")
@click.option("--threads", type=click.IntRange(1), default=torch.get_num_threads())
@click.option("--tiny", is_flag=True, help="Shapes that take no time, for a test.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(rounds: int, seconds: float, threads: int, tiny: bool, json_path: Path | None) -> None:
    """Measure what each choice of the CPU back end is worth."""
    arms = Arms(TINY if tiny else Shape(), threads)
    torch.set_num_threads(1)  # ours do the work, as when serving
    report = {"machine": describe_machine() | {"threads": threads}, "read_bandwidth": read_bandwidth() if not tiny else 0, "workloads": {}}
    with torch.inference_mode():
        for work in WORKLOADS:
            steps = arms.steps(work)
            times: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(rounds):
                for name, step in steps.items():
                    times[name].append(milliseconds(step, seconds))
            whole = times["everything"]
            rows = {}
            click.echo(f"\n{work.name}: {statistics.median(whole):.2f} ms")
            for name, own in times.items():
                ratios = [one / other for one, other in zip(own, whole, strict=True)]
                rows[name] = {"milliseconds": own, "ratio": statistics.median(ratios)}
                click.echo(f"  {statistics.median(ratios):6.2f} x  {name} ({min(ratios):.2f} to {max(ratios):.2f})")
            report["workloads"][work.name] = rows  # type: ignore[index]
    if json_path:
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
