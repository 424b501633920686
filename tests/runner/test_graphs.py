"""What surrounds a CUDA graph, on the CPU: a replay that calls again what was captured, on the same static tensors, equals eager steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from service.runner.graphs import DecodeGraphs, GraphLimits
from service.runner.runner import Runner
from service.scheduling.plan import PENDING, PromptRead, Sample, Slice, StepPlan
from service.scheduling.sampling import SamplingParams
from tests.runner.served import CONFIGS, PLAIN, Served, build_runner

NUM_BLOCKS = 40
MOST, GRAPHED = 6, 4  # sequences in a step, and rows of the largest graph


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices here are so small that a second thread only costs."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@dataclass
class Rerun:
    """A graph of the CPU: replaying calls again what was captured, which reads its inputs where it read them first."""

    launch: Callable[[], Tensor]
    output: Tensor

    def replay(self) -> None:
        self.output.copy_(self.launch())


class RerunRecorder:
    def capture(self, launch: Callable[[], Tensor]) -> tuple[Rerun, Tensor]:
        output = launch().clone()
        return Rerun(launch, output), output


def captured(name: str, max_sequences: int = GRAPHED) -> Runner:
    runner = build_runner(CONFIGS[name], NUM_BLOCKS)
    runner.capture_graphs(max_sequences, RerunRecorder())
    return runner


@pytest.mark.parametrize("name", CONFIGS)
def test_replays_equal_eager_steps(name: str) -> None:
    """Sequences that come, go, lose their blocks and grow, gangs, drafts, codes, ids that the host does not know: the same bits in logits
    and pool as without graphs, and as without PENDING."""
    few = {"plain": 20, "windows": 28, "pictures": 28}[name]
    served = Served(CONFIGS[name], few, MOST, seed=3)
    eager, graphed = build_runner(CONFIGS[name], NUM_BLOCKS), captured(name)
    hiding = build_runner(CONFIGS[name], NUM_BLOCKS)
    graphs = graphed.graphs
    assert graphs is not None
    for whole, hidden, drawn in served.steps(200):
        want = eager.logits(eager.forward(whole))
        for runner in (graphed, hiding):
            got = runner.logits(runner.forward(hidden))
            assert torch.equal(got, want), f"step {whole.step_id}"
            assert torch.equal(runner.cache.pool, eager.cache.pool), f"step {whole.step_id}"
            runner.state.keep(hidden, torch.tensor(drawn))
    assert graphs.num_replays > 40
    assert graphs.num_misses > 3
    used = {"pending", "gangs", "lost"} | {"plain": {"known", "drafted"}, "windows": {"drafted"}, "pictures": {"codes"}}[name]
    assert {key for key, count in served.counts.items() if count > 2} >= used, served.counts


def test_capture_and_padding_write_nothing() -> None:
    runner, untouched = captured("windows"), build_runner(CONFIGS["windows"], NUM_BLOCKS)
    assert torch.equal(runner.cache.pool, untouched.cache.pool)
    pieces = tuple(Slice(at, 4, (7,), ((2 * at, 2 * at + 1), (20 + 2 * at, 21 + 2 * at))) for at in range(3))
    runner.forward(StepPlan(0, pieces, ()))
    assert runner.graphs is not None
    assert runner.graphs.num_replays == 1
    for own, before in zip(runner.cache.views, untouched.cache.views, strict=True):
        for numbers, kept in zip(own, before, strict=True):
            changed = (numbers != kept).any(dim=-1).nonzero().tolist()
            assert {(block, place) for block, _, place in changed} == {(2 * at + 1 + first, 0) for at in range(3) for first in (0, 20)}


def test_which_steps_a_graph_runs() -> None:
    runner = captured("plain")
    graphs = runner.graphs
    assert graphs is not None
    assert list(graphs.captured) == [4, 2, 1]

    def plan(*lengths: int, reads: tuple[PromptRead, ...] = ()) -> StepPlan:
        pieces = tuple(Slice(at, 0, (7,) * count, ((at,),)) for at, count in enumerate(lengths))
        return StepPlan(0, pieces, (), reads=reads)

    for step, counts in (
        (plan(1), (1, 0)),
        (plan(1, 1, 1), (2, 0)),
        (plan(1, 1, 1, 1), (3, 0)),
        (plan(1, 1, 1, 1, 1), (3, 1)),
        (plan(1, 1, 2), (3, 1)),
        (plan(1, reads=(PromptRead(0, 0, pool="last"),)), (3, 2)),
    ):
        runner.forward(step)
        assert (graphs.num_replays, graphs.num_misses) == counts


@pytest.mark.parametrize(
    ("most", "largest"), [(1, [1]), (3, [1, 2, 3]), (100, [48, 64, 96, 100]), (256, [128, 192, 256]), (5000, [512, 768, 1024])]
)
def test_the_largest_graph_holds_every_step_there_can_be(most: int, largest: list[int]) -> None:
    runner = build_runner(CONFIGS["plain"], NUM_BLOCKS)
    assert runner.model.ops.step is not None
    limits = GraphLimits(1, 4, 64, most, False)
    graphs = DecodeGraphs(lambda inputs: inputs.ids, limits, runner.state, runner.model.ops.step, RerunRecorder())
    assert list(graphs.sizes[-len(largest) :]) == largest


def test_rows_come_in_the_order_of_the_samples() -> None:
    runner = captured("plain")
    pieces = tuple(Slice(at, 0, (5 + at,), ((at,),)) for at in range(4))
    params = SamplingParams(max_tokens=1)
    in_order = tuple(Sample(at, (at,), params, 1, 0) for at in range(4))
    every = runner.logits(runner.forward(StepPlan(0, pieces, in_order))).clone()
    for indexes in ((0, 1), (2, 3), (3, 0, 2), ()):
        samples = tuple(in_order[at] for at in indexes)
        assert torch.equal(runner.logits(runner.forward(StepPlan(0, pieces, samples))), every[list(indexes)])
    gang = (Sample(1, (1, 3), params, 1, 0), Sample(0, (0,), params, 1, 0))
    assert torch.equal(runner.logits(runner.forward(StepPlan(0, pieces, gang))), every[[1, 3, 0]])


@pytest.mark.parametrize("is_replayed", [True, False])
def test_blocks_of_a_step_that_failed_do_not_count_as_sent(is_replayed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out between what the host notes and what the device gets; the row's next sequence must not read by what was there."""
    runner, untouched = captured("plain"), captured("plain")
    samples = (Sample(1, (0,), SamplingParams(max_tokens=1), 5, 0),)
    length = 1 if is_replayed else 2

    def step(sequence: int, table: tuple[int, ...], released: tuple[int, ...] = ()) -> StepPlan:
        return StepPlan(0, (Slice(sequence, 4, (7,) * length, (table,)),), (replace(samples[0], sequence_id=sequence),), released)

    def fail(array: object, target: object) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    for each in (runner, untouched):
        each.forward(StepPlan(0, (Slice(0, 0, (5, 6, 8, 9), ((3,),)),), ()))
    failing = "service.runner.graphs.copy_into" if is_replayed else "service.runner.state.on_device"
    with monkeypatch.context() as broken:
        broken.setattr(failing, fail)
        with pytest.raises(torch.OutOfMemoryError):
            runner.forward(step(0, (3, 9)))
    later = step(1, (3, 9), released=(0,))
    assert torch.equal(runner.logits(runner.forward(later)), untouched.logits(untouched.forward(later)))
    assert torch.equal(runner.cache.pool, untouched.cache.pool)


def test_nothing_of_a_picture_stays_in_the_graph() -> None:
    """Codes beside text, then text alone with the same rows."""
    graphed, eager = captured("pictures"), build_runner(CONFIGS["pictures"], NUM_BLOCKS)
    samples = tuple(Sample(at, (at,), SamplingParams(max_tokens=1), 6, 0) for at in range(3))
    text = tuple(Slice(at, 5, (7,), ((2 * at, 2 * at + 1), (20 + 2 * at, 21 + 2 * at))) for at in range(3))
    codes = (replace(text[0], tokens=(103,), grid_starts=(3,)), replace(text[1], tokens=(104,), grid_starts=(5,)), text[2])
    for pieces in (codes, text, codes):
        plan = StepPlan(0, pieces, samples)
        assert torch.equal(graphed.logits(graphed.forward(plan)), eager.logits(eager.forward(plan)))
    assert not torch.equal(
        eager.logits(eager.forward(StepPlan(0, codes, samples))), eager.logits(eager.forward(StepPlan(0, text, samples)))
    )


def test_an_id_that_nobody_drew_is_refused_and_changes_nothing() -> None:
    runner = captured("plain")
    kept = runner.cache.pool.clone()
    lost = StepPlan(0, (Slice(0, 0, (5,), ((0,),)), Slice(8, 4, (PENDING,), ((1, 2),))), ())
    with pytest.raises(ValueError, match="sequence 8 waits for an id"):
        runner.forward(lost)
    assert torch.equal(runner.cache.pool, kept)
    runner.forward(replace(lost, slices=(lost.slices[0], replace(lost.slices[1], tokens=(6,)))))
    fresh = build_runner(PLAIN, NUM_BLOCKS)
    fresh.forward(replace(lost, slices=(lost.slices[0], replace(lost.slices[1], tokens=(6,)))))
    assert torch.equal(runner.cache.pool, fresh.cache.pool)


def test_a_back_end_without_step_kernels_says_so() -> None:
    runner = build_runner(PLAIN, NUM_BLOCKS)
    runner.model.ops = replace(runner.model.ops, step=None)
    with pytest.raises(ValueError, match="does not prepare steps on the device"):
        runner.capture_graphs(4, RerunRecorder())
