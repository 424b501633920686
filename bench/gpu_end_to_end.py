"""Part of `bench.gpu`: whole steps of models of known shapes, random weights, greedy: seconds a step and the share of the read limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.gpu import seconds
from bench.models import SHAPES, build_runner, step_of
from kernels.ops import select_ops

CONTEXT = 1024


def steps() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for name, batches in {"smollm2-135m": (1, 16, 64), "hybrid-270m": (1, 64), "llama-1b": (1, 64), "llama-8b": (1, 64)}.items():
        for batch in batches:
            yield f"decode {name}, {batch} x {CONTEXT}", lambda name=name, batch=batch: decode(name, batch)  # type: ignore[misc]
        yield f"prefill {name}, 1 x 2048", lambda name=name: prefill(name)  # type: ignore[misc]


def decode(name: str, batch: int) -> dict[str, Any]:
    """One captured decode step, inputs and sampling included."""
    config = SHAPES[name]
    runner = _runner(name, batch)
    runner.capture_graphs(batch)
    plan = step_of(runner, [(CONTEXT - 1, [7])] * batch, CONTEXT)
    step_s = seconds(lambda: runner.sample(runner.forward(plan)))
    graph_s = seconds(lambda: runner.graphs and runner.graphs.captured[min(s for s in runner.graphs.captured if s >= batch)].graph.replay())
    kv = sum(min(layer.window or CONTEXT, CONTEXT) for layer in config.layers) * 2 * config.num_kv_heads * config.head_width * 2 * batch
    read = runner.model.read_bytes + kv
    return {"step_s": step_s, "graph_s": graph_s, "tokens_per_s": batch / step_s, "bytes": read, "bytes_per_s": read / graph_s}


def prefill(name: str) -> dict[str, Any]:
    """One eager step of 2,048 prompt tokens."""
    runner = _runner(name, 2)
    plan = step_of(runner, [(0, list(range(2048)))], 2048)
    step_s = seconds(lambda: runner.sample(runner.forward(plan)))
    return {"step_s": step_s, "tokens_per_s": 2048 / step_s, "flops_per_s": 2 * SHAPES[name].num_parameters * 2048 / step_s}


def _runner(name: str, batch: int) -> Any:
    groups = 6 if name == "hybrid-270m" else 1
    torch.cuda.empty_cache()
    return build_runner(
        SHAPES[name],
        select_ops("triton"),
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        num_blocks=batch * groups * CONTEXT // 16 + 256,
    )
