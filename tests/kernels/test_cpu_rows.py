"""A row's bits on the compiled CPU back end depend on nothing but the row: not on the other rows, their number, or the threads."""

from __future__ import annotations

import pytest
import torch

from kernels.cpu.ops import cpu_ops
from kernels.linear.reference import quantize_int8
from kernels.ops import LayerWeights, Ops, PagedBatch, PagedKV
from tests.kernels.cpu_inputs import ISAS, needs_library, packed, random_layer

pytestmark = needs_library
COUNTS = (1, 2, 4, 12, 13, 16, 64)
NUM_ROWS = 64


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture(params=[(isa, threads) for isa in ISAS for threads in (1, 2)], ids=str)
def ops(request: pytest.FixtureRequest) -> Ops:
    return cpu_ops(*request.param)


def run_layer(
    ops: Ops, weights: LayerWeights, x: torch.Tensor, residual: torch.Tensor, y: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """All that a layer computes for the rows beside attention: q, K, V, residual, output."""
    rows = len(x)
    batch = PagedBatch(
        slots=torch.arange(rows),
        block_table=torch.zeros(rows, 1, dtype=torch.int32),
        query_start=torch.arange(rows + 1, dtype=torch.int32),
        context_len=torch.ones(rows, dtype=torch.int32),
        num_decodes=rows,
        max_query_len=0,
        max_context_len=1,
    )
    kv = PagedKV(torch.zeros(NUM_ROWS, 2, 1, 48), torch.zeros(NUM_ROWS, 2, 1, 48), batch)
    q, total = ops.qkv(x, residual.clone(), weights, positions, kv)
    out, total = ops.out_mlp(y, total, weights)
    return q, kv.keys[:rows], kv.values[:rows], total, out


@pytest.mark.parametrize(("activation", "bits"), [("silu", 0), ("gelu_tanh", 0), ("silu", 4), ("silu", 8)])
def test_layers(ops: Ops, generator: torch.Generator, activation: str, bits: int) -> None:
    weights = packed(random_layer(generator, activation=activation, has_bias=True, has_norms=True, bits=bits), ops)
    x, residual = (torch.randn(NUM_ROWS, len(weights.attention_norm), generator=generator) for _ in range(2))
    y = torch.randn(NUM_ROWS, 6 * 48, generator=generator)
    positions = torch.randint(500, (NUM_ROWS,), generator=generator)
    alone = [run_layer(ops, weights, *(t[i : i + 1] for t in (x, residual, y, positions))) for i in range(NUM_ROWS)]
    expected = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    for count in COUNTS:
        order = torch.randperm(NUM_ROWS, generator=generator)[:count]
        for ours, theirs in zip(run_layer(ops, weights, x[order], residual[order], y[order], positions[order]), expected, strict=True):
            assert torch.equal(ours, theirs[order])


def test_linear_embed_and_norm(ops: Ops, generator: torch.Generator) -> None:
    weight = ops.pack(quantize_int8(torch.randn(70, 92, generator=generator)))
    x = torch.randn(NUM_ROWS, 92, generator=generator)
    x[5] *= 1000  # a neighbour with large numbers must not coarsen the others
    norm = torch.randn(92, generator=generator)
    products = torch.cat([ops.linear(x[i : i + 1], weight) for i in range(NUM_ROWS)])
    normed = torch.cat([ops.rms_norm(x[i : i + 1], None, norm, 1e-6)[0] for i in range(NUM_ROWS)])
    for count in COUNTS:
        assert torch.equal(ops.linear(x[:count], weight), products[:count])
        assert torch.equal(ops.rms_norm(x[:count], None, norm, 1e-6)[0], normed[:count])


@pytest.mark.parametrize("isa", ISAS)
def test_thread_counts_agree(isa: str, generator: torch.Generator) -> None:
    weights = random_layer(generator)
    given = [torch.randn(NUM_ROWS, width, generator=generator) for width in (92, 92, 288)]
    positions = torch.arange(NUM_ROWS)
    results = [run_layer(one, packed(weights, one), *given, positions) for one in (cpu_ops(isa, threads) for threads in (1, 2, 5))]
    for others in results[1:]:
        for ours, theirs in zip(others, results[0], strict=True):
            assert torch.equal(ours, theirs)


def test_many_small_calls_in_a_row(ops: Ops, generator: torch.Generator) -> None:
    """Phases follow each other at once, and threads that overslept one must not disturb the next."""
    weight = quantize_int8(torch.randn(96, 64, generator=generator))
    table = ops.pack(weight)
    x = torch.randn(20, 64, generator=generator)
    expected = ops.linear(x, table)
    for _ in range(2000):
        assert torch.equal(ops.linear(x, table), expected)
