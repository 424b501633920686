"""Sampling on the compiled CPU back end: the same ids as the reference, whose noise and filters it repeats without a sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.cpu.ops import cpu_ops
from kernels.linear.reference import quantize_grouped, quantize_int8
from kernels.ops import Ops, SampleRows, Weight
from kernels.reference_ops import reference_ops
from tests.kernels.cpu_inputs import ISAS, needs_library

pytestmark = needs_library
REFERENCE = reference_ops()
NUM_ROWS = 48


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return cpu_ops(request.param, 2)


def sample_rows(generator: torch.Generator, **changes: float) -> SampleRows:
    def full(value: float) -> Tensor:
        return torch.full((NUM_ROWS,), value)

    return SampleRows(
        temperature=full(changes.get("temperature", 1.0)),
        top_k=full(changes.get("top_k", 0)).int(),
        top_p=full(changes.get("top_p", 1.0)),
        min_p=full(changes.get("min_p", 0.0)),
        seeds=torch.randint(-(2**63), 2**63 - 1, (NUM_ROWS,), generator=generator),
        positions=torch.randint(5000, (NUM_ROWS,), generator=generator),
    )


@pytest.mark.parametrize("vocab_size", [7, 1000, 49152])
@pytest.mark.parametrize("spread", [0.5, 4.0])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 40},
        {"top_p": 0.0},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 100, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_ids_are_the_references(ops: Ops, generator: torch.Generator, vocab_size: int, spread: float, changes: dict[str, float]) -> None:
    """The last bit of a logarithm may differ, and with it a winner by less than rounding: none does with this seed."""
    logits = torch.randn(NUM_ROWS, vocab_size, generator=generator) * spread
    rows = sample_rows(generator, **changes)
    assert torch.equal(ops.sample(logits, rows).ids, REFERENCE.sample(logits, rows).ids)


def test_equal_scores_infinities_and_nan(ops: Ops, generator: torch.Generator) -> None:
    logits = torch.randn(NUM_ROWS, 77, generator=generator)
    logits[0] = float("nan")
    logits[1] = float("-inf")
    logits[2, [5, 70]] = float("inf")
    logits[3] = 2.5
    logits[4, 10:40] = 9.0
    logits[5, 3] = float("nan")
    for changes in ({"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.7, "min_p": 0.2}):
        rows = sample_rows(generator, **changes)
        assert torch.equal(ops.sample(logits, rows).ids, REFERENCE.sample(logits, rows).ids), changes


@pytest.mark.parametrize("vocab_size", [7, 31, 100, 1000, 49152])
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.8, "min_p": 0.01}], ids=str)
def test_masked_ids_are_the_references(ops: Ops, generator: torch.Generator, vocab_size: int, changes: dict[str, float]) -> None:
    logits = torch.randn(NUM_ROWS, vocab_size, generator=generator) * 3
    rows = sample_rows(generator, **changes)
    rows.mask = torch.randint(-(2**31), 2**31 - 1, (NUM_ROWS, -(-vocab_size // 32)), generator=generator, dtype=torch.int32)
    rows.mask[1] = 0
    rows.mask[2] = 0
    rows.mask[2, -1] = 1 << ((vocab_size - 1) % 32) if (vocab_size - 1) % 32 < 31 else -(2**31)
    rows.mask[3] = -1
    logits[4, 0] = float("nan")
    ids = ops.sample(logits, rows).ids
    assert torch.equal(ids, REFERENCE.sample(logits, rows).ids)
    assert ids[2] == vocab_size - 1


def test_masks_penalties_and_logprobs(ops: Ops, generator: torch.Generator) -> None:
    logits = torch.randn(NUM_ROWS, 100, generator=generator) * 3
    rows = sample_rows(generator, top_p=0.95)
    rows.mask = torch.randint(-(2**31), 2**31 - 1, (NUM_ROWS, 4), generator=generator, dtype=torch.int32)
    rows.counts = torch.randint(3, (NUM_ROWS, 100), generator=generator, dtype=torch.int32)
    rows.seen = rows.counts > 0
    rows.repetition, rows.presence, rows.frequency = (
        torch.full((NUM_ROWS,), 1.3),
        torch.full((NUM_ROWS,), 0.4),
        torch.full((NUM_ROWS,), 0.2),
    )
    rows.logprobs, rows.num_top = True, 3
    ours, theirs = ops.sample(logits, rows), REFERENCE.sample(logits, rows)
    for name in ("ids", "logprobs", "top_ids", "top_logprobs"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_a_row_draws_the_same_alone(ops: Ops, generator: torch.Generator) -> None:
    logits = torch.randn(NUM_ROWS, 500, generator=generator) * 2
    rows = sample_rows(generator, top_p=0.9)
    ids = ops.sample(logits, rows).ids
    for row in (0, 17, NUM_ROWS - 1):
        assert ops.sample(logits[row : row + 1], one_of(rows, row)).ids.item() == ids[row]


def test_draws_follow_the_distribution(ops: Ops, generator: torch.Generator) -> None:
    """Chi-squared over 8 tokens: 7 degrees of freedom exceed 24.3 once in a thousand times; the seed is fixed."""
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, 2.0, 1.5, -1.0, 0.2]).repeat(20_000, 1)
    count = len(logits)
    ones = torch.ones(count)
    rows = SampleRows(ones, torch.zeros(count, dtype=torch.int32), ones, torch.zeros(count), torch.full((count,), 11), torch.arange(count))
    found = ops.sample(logits, rows).ids.bincount(minlength=8)
    expected = logits[0].softmax(-1) * count
    assert ((found - expected) ** 2 / expected).sum() < 24.3


HEADS = [7, 33, 500, 5000]


def head_inputs(generator: torch.Generator, vocab_size: int, kind: str) -> tuple[Tensor, Weight]:
    """Hidden rows [R, 64] and a head [V, 64]: int8 rows, or numbers of 4 bits in groups."""
    dense = torch.randn(vocab_size, 64, generator=generator)
    weight = quantize_int8(dense) if kind == "int8" else quantize_grouped(dense, 4)
    return torch.randn(NUM_ROWS, 64, generator=generator) * 0.5, weight


@pytest.mark.parametrize("vocab_size", HEADS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 256, "top_p": 0.9},
        {"top_k": 300},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"min_p": 0.0001, "temperature": 3.0},
        {"temperature": 1.7, "top_k": 100, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("has_mask", [False, True])
def test_a_fused_draw_is_the_draw_from_all_logits(
    ops: Ops, generator: torch.Generator, vocab_size: int, kind: str, changes: dict[str, float], has_mask: bool
) -> None:
    x, weight = head_inputs(generator, vocab_size, kind)
    rows = sample_rows(generator, **changes)
    if has_mask:
        rows.mask = torch.randint(-(2**31), 2**31 - 1, (NUM_ROWS, -(-vocab_size // 32)), generator=generator, dtype=torch.int32)
        rows.mask[1] = 0
    head = ops.pack(weight)
    assert torch.equal(ops.draw(x, head, rows).ids, ops.sample(ops.linear(x, head), rows).ids)


def test_a_fused_draw_of_rows_that_all_differ(ops: Ops, generator: torch.Generator) -> None:
    """Greedy beside sampled with and without thresholds, each as alone."""
    x, weight = head_inputs(generator, 3000, "int8")
    rows, head = sample_rows(generator), ops.pack(weight)
    rows.temperature[::3] = 0
    rows.top_k[1::3] = torch.arange(len(rows.top_k[1::3]), dtype=torch.int32) + 1
    rows.min_p[::5] = 0.05
    ids = ops.draw(x, head, rows).ids
    assert torch.equal(ids, ops.sample(ops.linear(x, head), rows).ids)
    for row in (0, 16, 31, NUM_ROWS - 1):
        assert ops.draw(x[row : row + 1], head, one_of(rows, row)).ids.item() == ids[row]


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"top_k": 5}, {"min_p": 0.5}], ids=str)
def test_more_equal_logits_than_a_draw_remembers(ops: Ops, generator: torch.Generator, changes: dict[str, float]) -> None:
    x, weight = head_inputs(generator, 9000, "int8")
    x[3] = 0
    x[4] = float("nan")
    rows, head = sample_rows(generator, **changes), ops.pack(weight)
    assert torch.equal(ops.draw(x, head, rows).ids, ops.sample(ops.linear(x, head), rows).ids)


def test_logprobs_and_penalties_take_all_logits(ops: Ops, generator: torch.Generator) -> None:
    x, weight = head_inputs(generator, 100, "int8")
    rows, head = sample_rows(generator), ops.pack(weight)
    rows.logprobs, rows.num_top = True, 2
    ours, theirs = ops.draw(x, head, rows), REFERENCE.sample(ops.linear(x, head), rows)
    for name in ("ids", "logprobs", "top_ids", "top_logprobs"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def one_of(rows: SampleRows, row: int) -> SampleRows:
    one = slice(row, row + 1)
    return SampleRows(rows.temperature[one], rows.top_k[one], rows.top_p[one], rows.min_p[one], rows.seeds[one], rows.positions[one])
