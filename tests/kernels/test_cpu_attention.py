"""Paged attention of the compiled CPU back end: against the reference, and bit-equal however a prompt is cut and whoever is beside it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.attention.cases import CASES, AttentionCase, build
from kernels.cpu.ops import cpu_ops
from kernels.ops import AttentionSpec, Neighbourhood, Ops, PagedBatch, PagedKV
from kernels.reference_ops import reference_ops
from tests.kernels.cpu_inputs import ISAS, copied, needs_library, paged_batch, random_kv, random_layer

pytestmark = needs_library
REFERENCE = reference_ops()
DTYPES = [torch.float32, torch.bfloat16, torch.int8]
SPECS = {
    "plain": AttentionSpec(0.125),
    "window": AttentionSpec(0.125, window=9),
    "sink": AttentionSpec(0.125, window=70, sink=3),
    "softcap": AttentionSpec(0.3, softcap=5.0),
    "all": AttentionSpec(0.3, window=33, sink=5, softcap=2.0),
}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return cpu_ops(request.param, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "width", "block_size"), [(6, 2, 16, 5), (3, 1, 64, 16), (4, 4, 80, 3)])
def test_ragged_batches(
    ops: Ops,
    generator: torch.Generator,
    dtype: torch.dtype,
    spec: AttentionSpec,
    num_heads: int,
    num_kv_heads: int,
    width: int,
    block_size: int,
) -> None:
    num_blocks = 2000 // block_size
    batch, positions = paged_batch([(99, 1), (0, 1), (600, 1), (0, 70), (130, 9), (300, 2)], block_size, num_blocks, generator)
    kv = random_kv(batch, (num_blocks, num_kv_heads, block_size, width), dtype, generator)
    q = torch.randn(len(positions), num_heads, width, generator=generator)
    atol = 1e-4 if dtype is torch.int8 else 5e-6  # beside int8, queries and weights may be rounded to 1 / 32,639 of a row's largest
    torch.testing.assert_close(ops.attend(q, kv, spec), REFERENCE.attend(q, kv, spec), rtol=1e-4, atol=atol)


def test_hidden_blocks_are_not_read(ops: Ops, generator: torch.Generator) -> None:
    spec = AttentionSpec(0.2, window=20, sink=4)
    batch, positions = paged_batch([(400, 1), (200, 40)], 4, 300, generator)
    kv = random_kv(batch, (300, 2, 4, 32), torch.float32, generator)
    batch.block_table[0, 1:95] = 0  # block 0 holds NaN; positions 4 ... 379 are hidden from position 400
    batch.block_table[1, 1:45] = 0  # and 4 ... 179 from positions 200 ... 239
    y = ops.attend(torch.randn(len(positions), 4, 32, generator=generator), kv, spec)
    assert y.isfinite().all()


def test_padded_sequences_and_rows_give_zeros(ops: Ops, generator: torch.Generator) -> None:
    batch, positions = paged_batch([(9, 1), (5, 1), (0, 6)], 4, 20, generator)
    batch.context_len[1] = 0
    kv = random_kv(batch, (20, 2, 4, 16), torch.float32, generator)
    q = torch.randn(len(positions) + 3, 4, 16, generator=generator)
    y = ops.attend(q, kv, SPECS["plain"])
    torch.testing.assert_close(y, REFERENCE.attend(q, kv, SPECS["plain"]), rtol=1e-5, atol=1e-6)
    assert not y[1].any()
    assert not y[-3:].any()


def rows_of(ops: Ops, q: Tensor, kv: PagedKV, spec: AttentionSpec, cuts: list[int]) -> Tensor:
    """y of one sequence whose queries are computed in slices that end at `cuts`; kv.batch holds its whole table."""
    results = []
    for low, high in itertools.pairwise([0, *cuts]):
        batch = PagedBatch(
            slots=torch.full((high - low,), -1),
            block_table=kv.batch.block_table,
            query_start=torch.tensor([0, high - low], dtype=torch.int32),
            context_len=torch.tensor([high], dtype=torch.int32),
            num_decodes=int(high - low == 1),
            max_query_len=high - low,
            max_context_len=high,
            grid_start=None if kv.batch.grid_start is None else kv.batch.grid_start[low:high].clone(),
        )
        results.append(ops.attend(q[low:high], replace(kv, batch=batch), spec))
    return torch.cat(results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_chunks_of_any_length_are_bit_equal(ops: Ops, generator: torch.Generator, dtype: torch.dtype, spec: AttentionSpec) -> None:
    length = 310
    batch, _ = paged_batch([(0, length)], 16, 30, generator)
    kv = random_kv(batch, (30, 1, 16, 64), dtype, generator)
    q = torch.randn(length, 3, 64, generator=generator)
    whole = rows_of(ops, q, kv, spec, [length])
    for cuts in ([1, 64, 65, 200, length], [*range(7, length, 7), length], list(range(1, length + 1))):
        assert torch.equal(rows_of(ops, q, kv, spec, cuts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_columns", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if case.near is not None and case.pool == "plain"], ids=lambda case: case.name)
def test_codes_see_their_neighbourhood(ops: Ops, dtype: torch.dtype, case: AttentionCase, has_columns: bool) -> None:
    """What no query sees is NaN."""
    q, kv = build(case, dtype)
    q, kv = q.float(), with_columns(kv) if has_columns else kv
    y = ops.attend(q, kv, case.spec)
    assert y.isfinite().all()
    torch.testing.assert_close(y, REFERENCE.attend(q, kv, case.spec), rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("has_columns", [False, True])
@pytest.mark.parametrize("window", [None, 40])
def test_chunks_of_pictures_are_bit_equal(ops: Ops, generator: torch.Generator, window: int | None, has_columns: bool) -> None:
    """Text, a picture of 9 x 9 codes, text, and a long other one, of which whole tiles are hidden from many a chunk."""
    length, starts = 310, [-1] * 50 + [50] * 81 + [-1] * 30 + [161] * 149
    spec = AttentionSpec(0.125, window, sink=4, neighbourhood=Neighbourhood(9, 2, 1))
    batch, _ = paged_batch([(0, length)], 16, 30, generator)
    kv = random_kv(replace(batch, grid_start=torch.tensor(starts, dtype=torch.int32)), (30, 1, 16, 64), torch.bfloat16, generator)
    kv = with_columns(kv) if has_columns else kv
    q = torch.randn(length, 3, 64, generator=generator)
    whole = rows_of(ops, q, kv, spec, [length])
    for cuts in ([1, 64, 65, 200, length], [*range(7, length, 7), length], list(range(1, length + 1))):
        assert torch.equal(rows_of(ops, q, kv, spec, cuts), whole)


def test_a_neighbourhood_without_pictures_changes_no_bit(ops: Ops, generator: torch.Generator) -> None:
    batch, positions = paged_batch([(99, 1), (600, 1), (0, 70), (130, 9)], 16, 100, generator)
    kv = with_columns(random_kv(batch, (100, 2, 16, 32), torch.bfloat16, generator))
    q = torch.randn(len(positions), 6, 32, generator=generator)
    near = replace(SPECS["all"], neighbourhood=Neighbourhood(4, 1, 1))
    plain = ops.attend(q, kv, SPECS["all"])
    assert torch.equal(ops.attend(q, kv, near), plain)
    no_codes = replace(batch, grid_start=torch.full((len(positions),), -1, dtype=torch.int32))
    assert torch.equal(ops.attend(q, replace(kv, batch=no_codes), near), plain)
    codes = replace(batch, grid_start=torch.where(positions >= 90, 90, -1).int())
    assert not torch.equal(ops.attend(q, replace(kv, batch=codes), near), plain)


@pytest.mark.parametrize("isa", ISAS)
def test_neighbours_and_threads_change_no_bit(isa: str, generator: torch.Generator) -> None:
    """One long decode alone has its splits spread over the threads; among others, and with one thread, it has not."""
    slices = [(700, 1), (1000, 1), *[(40 + i, 1) for i in range(20)], (0, 60)]
    batch, positions = paged_batch(slices, 16, 200, generator)
    kv = random_kv(batch, (200, 2, 16, 32), torch.bfloat16, generator)
    q = torch.randn(len(positions), 8, 32, generator=generator)
    crowd = cpu_ops(isa, 2).attend(q, kv, SPECS["plain"])
    assert torch.equal(cpu_ops(isa, 1).attend(q, kv, SPECS["plain"]), crowd)
    alone = PagedBatch(
        slots=batch.slots[1:2].contiguous(),
        block_table=batch.block_table[1:2].contiguous(),
        query_start=torch.tensor([0, 1], dtype=torch.int32),
        context_len=batch.context_len[1:2].contiguous(),
        num_decodes=1,
        max_query_len=0,
        max_context_len=1001,
    )
    for num_threads in (1, 2, 3):
        y = cpu_ops(isa, num_threads).attend(q[1:2], replace(kv, batch=alone), SPECS["plain"])
        assert torch.equal(y[0], crowd[1])


def with_columns(kv: PagedKV) -> PagedKV:
    """The same keys, each block of them laid down as columns."""
    return replace(kv, keys=kv.keys.transpose(2, 3).contiguous().transpose(2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("heads", [(3, 1), (4, 4), (8, 2), (14, 2)], ids=str)
@pytest.mark.parametrize("block_size", [16, 64, 12, 128])
def test_keys_as_columns_change_no_bit(
    ops: Ops, generator: torch.Generator, dtype: torch.dtype, spec: AttentionSpec, heads: tuple[int, int], block_size: int
) -> None:
    """Blocks that vectors fit, that they straddle, and that are longer than a tile; decodes, chunks, and NaN in what nobody sees."""
    batch, positions = paged_batch([(0, 1), (70, 1), (255, 1), (256, 1), (400, 1), (0, 40), (90, 33)], block_size, 200, generator)
    kv = random_kv(batch, (200, heads[1], block_size, 32), dtype, generator)
    for table, context in zip(batch.block_table, batch.context_len.tolist(), strict=True):
        last, place = divmod(context - 1, block_size)
        nobody = [kv.keys, kv.values] if kv.key_scales is None or kv.value_scales is None else [kv.key_scales, kv.value_scales]
        for pool in nobody:
            pool[table[last], :, place + 1 :] = float("nan")
    q = torch.randn(len(positions), heads[0], 32, generator=generator)
    y = ops.attend(q, with_columns(kv), spec)
    assert y.isfinite().all()
    assert torch.equal(y, ops.attend(q, kv, spec))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_are_written_as_columns(ops: Ops, generator: torch.Generator, dtype: torch.dtype) -> None:
    batch, positions = paged_batch([(5, 1), (0, 20)], 16, 8, generator)
    weights = random_layer(generator, has_norms=True)
    spec = weights.spec
    shape = (8, spec.num_kv_heads, 16, spec.head_width)
    rows = copied(random_kv(batch, shape, dtype, generator))
    columns = with_columns(copied(rows))
    product = torch.randn(len(positions), (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_width, generator=generator)
    q = ops.kv_write(product, weights, positions, rows)
    assert torch.equal(ops.kv_write(product, weights, positions, columns), q)
    for ours, theirs in zip(tensors_of(columns), tensors_of(rows), strict=True):
        assert torch.equal(ours.nan_to_num(9), theirs.nan_to_num(9))


def test_int8_heads_have_scales_of_their_own(ops: Ops, generator: torch.Generator) -> None:
    batch, positions = paged_batch([(5, 1), (0, 20)], 16, 8, generator)
    batch.slots[3] = -1
    weights = random_layer(generator, has_norms=True)
    spec = weights.spec
    kv = random_kv(batch, (8, spec.num_kv_heads, 16, spec.head_width), torch.int8, generator)
    expected = copied(kv)
    product = torch.randn(len(positions), (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_width, generator=generator)
    product[:, -spec.head_width :] *= 1000  # one head's values must not coarsen another's
    ops.kv_write(product, weights, positions, kv)
    REFERENCE.kv_write(product, weights, positions, expected)
    for ours, theirs in zip(tensors_of(kv), tensors_of(expected), strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-5, atol=1.0 if ours.dtype is torch.int8 else 0, equal_nan=True)
    assert float((kv.keys != expected.keys).float().mean()) < 0.01, "a tie here and there may be rounded otherwise"


def tensors_of(kv: PagedKV) -> list[Tensor]:
    return [x for x in (kv.keys, kv.values, kv.key_scales, kv.value_scales) if x is not None]
