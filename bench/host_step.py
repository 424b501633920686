"""What the host does for a decode step before the device can begin: numbers packed, sent and replayed, against all tensors built anew.

No model: what is captured is the preparing of inputs alone. `python -m bench.host_step [--device cuda]`, and G18 of `bench.gpu`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.ops import select_ops
from service.runner.graphs import CudaRecorder, DecodeGraphs, GraphLimits, Recorder
from service.runner.inputs import StepInputs, build_inputs
from service.runner.state import StateTable
from service.scheduling.plan import PENDING, Sample, Slice, StepPlan
from service.scheduling.sampling import SamplingParams

BLOCK_SIZE = 16


class HostRecorder:
    """A graph that does nothing: on a machine without a GPU only the host's own part is of interest."""

    def capture(self, launch: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        return self, launch()

    def replay(self) -> None:
        pass


def plans(batch: int, context: int, num_groups: int, count: int) -> Iterator[StepPlan]:
    """Decode steps whose ids the host does not know yet. Contexts begin at `context` and differ by a token, so a sixteenth of the rows
    gets a new block each step."""
    params = SamplingParams(max_tokens=1, temperature=0)
    most = -(-(context + count + BLOCK_SIZE) // BLOCK_SIZE)
    blocks = [[[(row * num_groups + group) * most + at for at in range(most)] for group in range(num_groups)] for row in range(batch)]
    tables: dict[int, tuple[tuple[int, ...], ...]] = {}
    for step in range(count):
        slices, samples = [], []
        for row in range(batch):
            start = context + row % BLOCK_SIZE + step
            used = start // BLOCK_SIZE + 1
            if row not in tables or len(tables[row][0]) < used:
                tables[row] = tuple(tuple(table[:used]) for table in blocks[row])  # the same ints again, as of a scheduler
            slices.append(Slice(row, start, (PENDING,), tables[row]))
            samples.append(Sample(row, (row,), params, start + 1, 0))
        yield StepPlan(step, tuple(slices), tuple(samples))


def measure(device: torch.device, *, batch: int = 256, context: int = 2048, num_groups: int = 1, count: int = 100) -> dict[str, Any]:
    """Median milliseconds of the host: replay_ms of a replayed step's inputs, keep_ms of noting what was drawn, build_ms of building the
    inputs of the same step from nothing, as steps without a graph and other back ends do."""
    is_gpu = device.type == "cuda"
    state = StateTable(device)
    recorder: Recorder = CudaRecorder() if is_gpu else HostRecorder()
    step_ops = select_ops("triton" if is_gpu else "reference").step
    assert step_ops is not None
    limits = GraphLimits(num_groups, BLOCK_SIZE, context + count + BLOCK_SIZE, batch)
    graphs = DecodeGraphs(_ids_alone, limits, state, step_ops, recorder)
    drawn = torch.zeros(batch, dtype=torch.int64, device=device)
    found: dict[str, list[float]] = {"replay_ms": [], "keep_ms": [], "build_ms": []}
    with torch.inference_mode():
        graphs.capture()
        for plan in plans(batch, context, num_groups, count):
            if not plan.step_id:
                state.admit(plan.slices)
                state.keep(plan, drawn)
            found["replay_ms"].append(_ms(lambda plan=plan: graphs.run(plan, state.admit(plan.slices))))  # type: ignore[misc]
            found["keep_ms"].append(_ms(lambda plan=plan: state.keep(plan, drawn)))  # type: ignore[misc]
        for plan in plans(batch, context, num_groups, count):
            found["build_ms"].append(_ms(lambda plan=plan: build_inputs(plan, num_groups, BLOCK_SIZE, device)))  # type: ignore[misc]
    shape = {"batch": batch, "context": context, "num_groups": num_groups, "device": str(device)}
    return shape | {name: round(statistics.median(times), 4) for name, times in found.items()}


def _ids_alone(inputs: StepInputs) -> Tensor:
    return inputs.ids


def _ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--context", type=int, default=2048)
    options = parser.parse_args()
    for num_groups in (1, 6):
        print(json.dumps(measure(torch.device(options.device), batch=options.batch, context=options.context, num_groups=num_groups)))


if __name__ == "__main__":
    main()
