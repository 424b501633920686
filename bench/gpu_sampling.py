"""Part of `bench.gpu`: sampling from large vocabularies, line G9, beside the usual way in torch (sort, cumulated sum, multinomial).

No correctness here: that is `gpu_correctness`. Shape suffixes: R rows, V vocabulary, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_clock import Clock
from bench.gpu_score import Line, Step, scored, steps_of, timed
from kernels.ops import SampleRows, select_ops
from kernels.sample.reference import penalised


def rows_of(clock: Clock, count: int, vocab_size: int, *, has_penalties: bool) -> SampleRows:
    def same(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((count,), value, dtype=dtype, device=clock.device)

    rows = SampleRows(
        temperature=same(0.7),
        top_k=same(50, torch.int32),
        top_p=same(0.9),
        min_p=same(0.0),
        seeds=torch.arange(count, device=clock.device),
        positions=torch.arange(count, device=clock.device),
    )
    if has_penalties:
        rows.counts = (torch.rand((count, vocab_size), device=clock.device) > 0.99).int()
        rows.seen = rows.counts > 0
        rows.repetition, rows.presence, rows.frequency = same(1.1), same(0.2), same(0.1)
    return rows


def by_sorting(logits_RV: Tensor, rows: SampleRows) -> Tensor:
    """Every row with the same top_k, as such code usually has it."""
    scores = penalised(logits_RV, rows) / rows.temperature[:, None]
    ordered, ids = scores.sort(-1, descending=True)
    shares = ordered.softmax(-1)
    is_out = shares.cumsum(-1) - shares > rows.top_p[:, None]
    is_out |= torch.arange(scores.shape[1], device=scores.device) >= rows.top_k[:, None]
    drawn = torch.multinomial(ordered.masked_fill(is_out, float("-inf")).softmax(-1), 1)
    return ids.gather(1, drawn)[:, 0]


def sample(clock: Clock, count: int) -> dict[str, Any]:
    count, vocab_size = clock.sized((count, 262_144), (2, 300))
    logits = 3 * torch.randn((count, vocab_size), device=clock.device)
    rows = rows_of(clock, count, vocab_size, has_penalties=True)
    ours = select_ops("triton").sample
    mine = clock.in_graph_s(lambda: ours(logits, rows))
    baselines = timed(clock, {"torch, sorting": lambda: partial(by_sorting, logits, rows)}, in_graph=False)
    return scored(clock.rates.seconds(num_bytes=logits.nbytes, kernels=2), mine, baselines)


def draw(clock: Clock, count: int) -> dict[str, Any]:
    """The head's product besides, whose logits need not be written."""
    count, vocab_size, width = clock.sized((count, 262_144, 1152), (2, 300, 64))
    head = torch.randn((vocab_size, width), dtype=clock.dtype, device=clock.device)
    x = torch.randn((count, width), dtype=clock.dtype, device=clock.device)
    rows = rows_of(clock, count, vocab_size, has_penalties=False)
    ops = select_ops("triton")
    packed = ops.pack(head)
    mine = clock.in_graph_s(lambda: ops.draw(x, packed, rows))
    plain = {"cuBLAS, then torch, sorting": lambda: lambda: by_sorting((x @ head.t()).float(), rows)}
    limit = clock.rates.seconds(num_bytes=head.nbytes, flops=2.0 * count * head.numel(), kernels=2)
    return scored(limit, mine, timed(clock, plain, in_graph=False))


LINES = (
    Line(
        "G9",
        "sampling from 262,144 tokens: penalties, temperature, top-k 50, top-p 0.9",
        "logits read once / read bandwidth + two launches; with the head its weights instead",
        0.35,
        0.70,
        {f"sample {count}": partial(sample, count=count) for count in (64, 1, 256)}
        | {f"head and draw {count}": partial(draw, count=count) for count in (64, 1, 256)},
    ),
)


def steps(clock: Clock) -> list[Step]:
    return steps_of(clock, LINES)
