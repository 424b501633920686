"""The runner's side of prompt reads: bounded logits, rows of different wishes, sums that end with their sequence, and no graph."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bench.models import SHAPES, build_runner
from kernels.ops import select_ops
from service.runner.reader import LOGIT_ROWS
from service.runner.runner import Runner
from service.scheduling.plan import PromptRead, PromptReading, Slice, StepPlan
from service.scheduling.reading import Pool
from tests.runner.test_graphs import RerunRecorder

IDS = tuple((11 * i * i + 5) % 509 for i in range(200))


@pytest.fixture(scope="module")
def shared_runner() -> Runner:
    cpu = torch.device("cpu")
    return build_runner(SHAPES["tiny"], select_ops("reference"), device=cpu, dtype=torch.float32, num_blocks=64)


@pytest.fixture
def runner(shared_runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(shared_runner.reader, "_pooled", {})
    return shared_runner


def piece(runner: Runner, sequence: int, start: int, end: int) -> Slice:
    """Tokens start ... end - 1 of IDS; each sequence owns 14 blocks of each group."""
    tables = tuple(
        tuple(range((sequence * runner.num_groups + group) * 14, (sequence * runner.num_groups + group + 1) * 14)) for group in range(2)
    )
    used = -(-end // runner.cache.block_size)
    return Slice(sequence, start, IDS[start:end], tuple(table[:used] for table in tables))


def run(runner: Runner, slices: list[Slice], reads: list[PromptRead], released: tuple[int, ...] = ()) -> list[PromptReading]:
    return runner.read(runner.forward(StepPlan(0, tuple(slices), (), released, reads=tuple(reads))))


def test_logits_of_few_rows_exist_at_once(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    logits = runner.model.logits

    def watched(x: Tensor, residual: Tensor, rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return logits(x, residual, rows)

    monkeypatch.setattr(runner.model, "logits", watched)
    (reading,) = run(runner, [piece(runner, 0, 0, 200)], [PromptRead(0, 0, 0, IDS[1:], num_top=2)])
    assert len(reading.logprobs) == 199
    assert sum(sizes) == 199
    assert max(sizes) <= LOGIT_ROWS


def test_each_read_gets_its_own_rows_and_its_own_number_of_alternatives(runner: Runner) -> None:
    alone = [
        run(runner, [piece(runner, number, 0, end)], [PromptRead(0, number, first, IDS[first + 1 : end], num_top)])[0]
        for number, (end, first, num_top) in enumerate([(40, 0, 0), (90, 60, 4)])
    ]
    together = run(
        runner,
        [piece(runner, 0, 0, 40), piece(runner, 1, 0, 90)],
        [PromptRead(0, 0, 0, IDS[1:40], 0), PromptRead(1, 1, 60, IDS[61:90], 4)],
    )
    for one, other in zip(alone, together, strict=True):
        assert [logprob for logprob, _ in one.logprobs] == pytest.approx([logprob for logprob, _ in other.logprobs], abs=1e-5)
        assert [[token for token, _ in top] for _, top in one.logprobs] == [[token for token, _ in top] for _, top in other.logprobs]
    assert {len(top) for _, top in together[0].logprobs} == {0}
    assert {len(top) for _, top in together[1].logprobs} == {4}


def test_logprobs_are_those_that_drawing_tells(runner: Runner) -> None:
    (reading,) = run(runner, [piece(runner, 0, 0, 30)], [PromptRead(0, 0, 0, IDS[1:30], num_top=20)])
    for logprob, top in reading.logprobs:
        assert logprob <= top[0][1] <= 0
        assert sum(math.exp(value) for _, value in top) <= 1 + 1e-6


def test_rows_that_are_not_numbers_tell_minus_infinity(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: Tensor, residual: Tensor, rows: Tensor) -> Tensor:
        logits = torch.zeros(len(rows), 509)
        logits[0] = float("nan")
        logits[1, 3] = float("inf")
        logits[2, IDS[3]] = float("-inf")
        return logits

    monkeypatch.setattr(runner.model, "logits", broken)
    (reading,) = run(runner, [piece(runner, 0, 0, 4)], [PromptRead(0, 0, 0, IDS[1:4], num_top=1)])
    assert [logprob for logprob, _ in reading.logprobs] == [-math.inf, pytest.approx(-3.4e38, rel=0.01), -math.inf]
    assert not any(math.isnan(value) for _, top in reading.logprobs for _, value in top)
    assert reading.logprobs[1][1] == ((3, 0.0),)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_sums_end_with_the_vector_or_with_the_sequence(runner: Runner, pool: Pool) -> None:
    first = PromptRead(0, 0, pool=pool)
    last = PromptRead(0, 0, pool=pool, is_last=True)
    (reading,) = run(runner, [piece(runner, 0, 0, 30)], [first])
    assert reading.vector is None
    (whole,) = run(runner, [piece(runner, 0, 30, 50)], [last])
    assert whole.vector is not None
    assert len(whole.vector) == 4 * SHAPES["tiny"].width
    assert not runner.reader._pooled
    run(runner, [piece(runner, 0, 0, 30)], [first])
    run(runner, [piece(runner, 1, 0, 3)], [], released=(0,))
    run(runner, [piece(runner, 1, 3, 4)], [])
    assert not runner.reader._pooled


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("start", [0, 30])
def test_who_was_aborted_in_flight_costs_nobody_his_reading(runner: Runner, pool: Pool, start: int) -> None:
    """The step behind, which releases the sequence, is begun before the one that still has a slice of it is read."""
    (expected,) = run(runner, [piece(runner, 1, 0, 20)], [PromptRead(0, 1, pool=pool, is_last=True)])
    if start:
        run(runner, [piece(runner, 0, 0, start)], [PromptRead(0, 0, pool=pool)])
    reads = (PromptRead(0, 0, pool=pool), PromptRead(1, 1, pool=pool, is_last=True))
    flying = runner.forward(StepPlan(0, (piece(runner, 0, start, 40), piece(runner, 1, 0, 20)), (), reads=reads))
    runner.forward(StepPlan(1, (piece(runner, 1, 20, 21),), (), released=(0,)))
    _, reading = runner.read(flying)
    assert reading.vector is not None
    assert expected.vector is not None
    vectors = [torch.frombuffer(bytearray(vector), dtype=torch.float32) for vector in (expected.vector, reading.vector)]
    torch.testing.assert_close(*vectors, atol=1e-5, rtol=1e-5)
    runner.forward(StepPlan(2, (piece(runner, 1, 21, 22),), ()))
    assert not runner.reader._pooled, "a sequence that is gone is kept for ever"


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_prompt_that_begins_again_is_not_counted_twice(runner: Runner, pool: Pool) -> None:
    (expected,) = run(runner, [piece(runner, 0, 0, 50)], [PromptRead(0, 0, pool=pool, is_last=True)])
    run(runner, [piece(runner, 0, 0, 20)], [PromptRead(0, 0, pool=pool)])
    run(runner, [piece(runner, 0, 0, 33)], [PromptRead(0, 0, pool=pool)])
    (again,) = run(runner, [piece(runner, 0, 33, 50)], [PromptRead(0, 0, pool=pool, is_last=True)])
    assert expected.vector is not None
    assert again.vector is not None
    vectors = [torch.frombuffer(bytearray(vector), dtype=torch.float32) for vector in (expected.vector, again.vector)]
    torch.testing.assert_close(*vectors, atol=1e-5, rtol=1e-5)


def test_steps_with_reads_use_no_graph() -> None:
    """A graph keeps the logits of its steps and no hidden states."""
    runner = build_runner(SHAPES["tiny"], select_ops("reference"), device=torch.device("cpu"), dtype=torch.float32, num_blocks=64)
    runner.capture_graphs(2, RerunRecorder())
    graphs = runner.graphs
    assert graphs is not None
    (reading,) = run(runner, [piece(runner, 0, 0, 1)], [PromptRead(0, 0, pool="last", is_last=True)])
    assert reading.vector is not None
    assert (graphs.num_replays, graphs.num_misses) == (0, 1)
    runner.forward(StepPlan(0, (piece(runner, 0, 0, 1),), ()))
    assert (graphs.num_replays, graphs.num_misses) == (1, 1)


def test_a_step_without_reads_keeps_no_states(runner: Runner) -> None:
    handle = runner.forward(StepPlan(0, (piece(runner, 0, 0, 5),), ()))
    assert handle.states is None
    assert runner.read(handle) == []
