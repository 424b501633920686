"""State and graphs on a device: what a real scheduler plans, replayed, equals eager steps; ids drawn never come back for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.ops import select_ops
from service.runner.inputs import copy_into
from service.runner.runner import Runner
from service.scheduling.plan import PENDING, Sample, Slice, StepPlan
from service.scheduling.sampling import SamplingParams
from tests.runner.served import CONFIGS, Served, build_runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NUM_BLOCKS, MOST = 40, 6


def on_gpu(name: str, *, has_graphs: bool) -> Runner:
    config = replace(CONFIGS[name], width=64, head_width=32, feed_forward_width=64)
    runner = build_runner(config, NUM_BLOCKS, select_ops("triton"), "cuda", torch.float32)
    if has_graphs:
        runner.capture_graphs(MOST)
    return runner


@pytest.mark.parametrize("name", CONFIGS)
def test_replays_and_eager_steps_with_pending_ids_equal_plain_ones(name: str) -> None:
    """Where something is written must be the same; logits may differ as products do whose batch is padded (those of random inputs here are
    about 1)."""
    served = Served(CONFIGS[name], {"plain": 20}.get(name, 28), MOST, seed=3)
    eager, graphed, hiding = on_gpu(name, has_graphs=False), on_gpu(name, has_graphs=True), on_gpu(name, has_graphs=False)
    kept = eager.cache.pool.clone()
    for whole, hidden, drawn in served.steps(200):
        want = eager.logits(eager.forward(whole))
        for runner in (graphed, hiding):
            torch.testing.assert_close(runner.logits(runner.forward(hidden)), want, atol=2e-2, rtol=0)
            assert torch.equal((runner.cache.pool != kept).any(-1), (eager.cache.pool != kept).any(-1))
            runner.state.keep(hidden, torch.tensor(drawn, device="cuda"))
    assert graphed.graphs is not None
    assert graphed.graphs.num_replays > 40
    assert served.counts["pending"] > 40


def test_nothing_waits_for_the_device() -> None:
    """Replay, eager step and the keeping of ids, under torch's own watch for synchronising calls."""
    runner = on_gpu("windows", has_graphs=True)
    samples = tuple(Sample(at, (at,), SamplingParams(max_tokens=1), 6, 0) for at in range(3))
    decodes = tuple(Slice(at, 5, (7,), ((2 * at, 2 * at + 1), (20 + 2 * at, 21 + 2 * at))) for at in range(3))
    mixed = (*decodes[:2], replace(decodes[2], start=4, tokens=(5, 6)))
    drawn = torch.tensor([5, 6, 7], device="cuda")
    for pieces in (decodes, mixed):  # kernels are compiled here
        runner.forward(StepPlan(0, pieces, samples))
    runner.state.keep(StepPlan(0, decodes, samples), drawn)
    later = tuple(
        replace(piece, tokens=(*piece.tokens[:-1], PENDING), tables=tuple(map(tuple, map(list, piece.tables)))) for piece in mixed
    )
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for pieces in (decodes, later, tuple(replace(piece, tokens=(PENDING,)) for piece in decodes)):
            plan = StepPlan(0, pieces, samples)
            runner.forward(plan)
            runner.state.keep(plan, drawn)
    finally:
        torch.cuda.set_sync_debug_mode("default")


DRAWN_AS = {
    "greedy": ({"temperature": 0.0}, {}),
    "filtered": ({"top_k": 5, "top_p": 0.9, "min_p": 0.01}, {}),
    "penalised": ({"repetition_penalty": 1.2, "presence_penalty": 0.5}, {"history": (5, 6, 7, 8, 9, PENDING), "prompt_len": 5}),
    "biased": ({"logit_bias": ((3, 1.5), (4, -1.0))}, {}),
    "with logprobs": ({"logprobs": 3}, {}),
    "banned": ({}, {"banned": (3, 40)}),
}


@pytest.mark.parametrize("kind", [*DRAWN_AS, "guided", "masked"])
def test_nothing_waits_for_what_is_drawn(kind: str) -> None:
    """Drawing, whatever the samples ask for, until the ids are wanted; and they are there then."""
    runner = on_gpu("windows", has_graphs=True)
    params, more = DRAWN_AS.get(kind, ({}, {}))
    own = SamplingParams(max_tokens=1, **params)
    samples = tuple(Sample(at, (at,), own, 6, 0, **more) for at in range(3))
    if kind == "guided":
        samples = (Sample(0, (0, 2), replace(own, min_p=0.05), 6, 0, guidance=2.0), samples[1])
    masks = np.full((len(samples), -(-runner.model.config.vocab_size // 32)), -2, dtype=np.int32) if kind in ("guided", "masked") else None
    pieces = tuple(Slice(at, 5, (7,), ((2 * at, 2 * at + 1), (20 + 2 * at, 21 + 2 * at))) for at in range(3))
    known = tuple(replace(sample, history=sample.history and (*sample.history[:-1], 10)) for sample in samples)
    first = runner.draw(runner.forward(StepPlan(0, pieces, known)), masks).wait()  # kernels are compiled here
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawing = runner.draw(runner.forward(StepPlan(1, pieces, samples, released=())), masks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    drawn = drawing.wait()
    assert len(drawn) == len(first) == len(samples)
    assert all(0 <= one.token < runner.model.config.vocab_size for one in drawn)
    if kind != "penalised":  # what was drawn first counts there
        assert [one.token for one in drawn] == [one.token for one in first]


def test_numbers_in_flight_are_not_overwritten() -> None:
    """Copies wait behind long work while the host goes on and asks for the memory of the next one."""
    targets = [torch.zeros(4096, dtype=torch.int32, device="cuda") for _ in range(40)]
    copy_into(np.zeros(4096, dtype=np.int32), targets[0])
    torch.cuda._sleep(500_000_000)
    for number, target in enumerate(targets):
        copy_into(np.full(4096, number, dtype=np.int32), target)
    torch.cuda.synchronize()
    assert [target.unique().tolist() for target in targets] == [[number] for number in range(40)]
