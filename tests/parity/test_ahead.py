"""Steps that are begun before the ids of those in front are known give the ids of steps one after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.models import SHAPES, RandomSource
from service.model.transformer import Precision, Transformer, build_transformer
from service.scheduling.sampling import SamplingParams
from service.scheduling.sequence import Request
from tests.parity.generate import Desk
from tests.runner.served import row_by_row_ops
from tests.runner.test_graphs import RerunRecorder

CPU = torch.device("cpu")
PARAMS = SamplingParams(max_tokens=30, temperature=0.8, seed=3)
WAYS = {
    "greedy": replace(PARAMS, temperature=0.0),
    "sampled": replace(PARAMS, top_p=0.9, top_k=40),
    "penalties": replace(PARAMS, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4),
    "bias and a least length": replace(PARAMS, logit_bias=((5, 4.0),), stop_ids=tuple(range(0, 500, 3)), min_tokens=12),
    "stop ids": replace(PARAMS, stop_ids=tuple(range(0, 500, 17))),
}


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = SHAPES["tiny"]
    with torch.inference_mode():
        return build_transformer(config, RandomSource(config, CPU), row_by_row_ops(), precision=Precision(torch.float32))


@pytest.mark.parametrize("has_graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("num_blocks", [400, 60], ids=["room", "preempted"])
def test_ids_are_those_of_steps_one_by_one(model: Transformer, num_blocks: int, has_graphs: bool) -> None:
    """Prompts shorter and longer than a step, chunked beside others; one that quotes itself and has its ids guessed. Graphs are stand-ins
    that call again what they captured."""
    requests = [
        Request(f"{way} {size}", (tuple((size * 7 + at) % 500 for at in range(size)),), replace(params, seed=size), draft_len=draft_len)
        for way, params in WAYS.items()
        for size, draft_len in ((5, 0), (60, 0), (130, 8))
    ]
    desks = [
        Desk(model, num_blocks=num_blocks, max_batch_tokens=48, kv_dtype=torch.float32, is_ahead=is_ahead) for is_ahead in (False, True)
    ]
    one_by_one, ahead = desks
    if has_graphs:
        ahead.runner.capture_graphs(64, RerunRecorder())
    for desk in desks:
        desk.run(requests)
    assert ahead.ids == one_by_one.ids
    assert len({len(ids) for ids in ahead.ids.values()}) > 3, "nobody stopped early"
    assert (ahead.scheduler.stats.preemptions > 0) == (num_blocks == 60)
    assert ahead.num_pending > 100
    assert one_by_one.num_pending == 0
    assert ahead.runner.graphs is None or ahead.runner.graphs.num_replays > 20
