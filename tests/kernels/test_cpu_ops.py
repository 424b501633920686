"""Every operation of the compiled CPU back end against the reference, at each instruction set this machine can run."""

from __future__ import annotations

import pytest
import torch

from kernels.linear.reference import dense_of, quantize_grouped, quantize_int8
from kernels.ops import GroupedWeight, Int8Weight, Ops
from kernels.reference_ops import reference_ops
from tests.kernels.cpu_inputs import ISAS, copied, dense, needs_library, packed, paged_batch, random_kv, random_layer
from tests.kernels.rule import assert_earned

pytestmark = needs_library
REFERENCE = reference_ops()
SLICES = [(30, 1), (0, 1), (7, 5), (0, 20)]
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
# Rounding differences before a quantisation can move a number by one of its 127 steps: 1 / 127 of a row's largest, through one product.
AFTER_QUANTISING = {"rtol": 0.02, "atol": 0.02}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> Ops:
    from kernels.cpu.ops import cpu_ops

    return cpu_ops(request.param, 2)


@pytest.mark.parametrize(("out", "width"), [(16, 4), (33, 7), (100, 92), (64, 1536), (513, 64)])
@pytest.mark.parametrize("num_rows", [1, 5, 13, 50])
def test_linear_is_the_reference_to_the_bit(ops: Ops, generator: torch.Generator, out: int, width: int, num_rows: int) -> None:
    weight = quantize_int8(torch.randn(out, width, generator=generator))
    x = torch.randn(num_rows, width, generator=generator)
    x[0] = 0
    assert torch.equal(ops.linear(x, ops.pack(weight)), REFERENCE.linear(x, weight))


def test_linear_does_not_overflow_at_the_largest_numbers(ops: Ops) -> None:
    weight = Int8Weight(16, 2048, torch.full((16, 2048), -127, dtype=torch.int8), torch.ones(16))
    weight.values[3] = 127
    weight.values[4] = -128
    x = torch.ones(2, 2048)
    x[1] = -1
    assert torch.equal(ops.linear(x, ops.pack(weight)), REFERENCE.linear(x, weight))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "width"), [(16, 32), (33, 64), (100, 96), (64, 1536), (513, 64)])
@pytest.mark.parametrize("num_rows", [1, 5, 13, 50])
def test_linear_over_groups(ops: Ops, generator: torch.Generator, bits: int, out: int, width: int, num_rows: int) -> None:
    weight = quantize_grouped(torch.randn(out, width, generator=generator) + 0.3, bits)
    x = torch.randn(num_rows, width, generator=generator)
    x[0] = 0
    x[-1] *= torch.logspace(-4, 4, width)
    assert_earned(ops.linear(x, ops.pack(weight)), REFERENCE.linear(x, weight), REFERENCE.linear(x.double(), weight))


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_do_not_overflow_at_the_largest_numbers(ops: Ops, bits: int) -> None:
    """All sums are whole numbers here, so the result has to be exact."""
    values = torch.full((16, 2048), 2**bits - 1, dtype=torch.uint8)
    values[3] = 0
    values[4, ::2] = 0
    ones = torch.ones(16, 64, dtype=torch.float16)
    weight = GroupedWeight(16, 2048, bits, values, ones, -ones * 2 ** (bits - 1))
    x = torch.full((2, 2048), 127.0)
    x[1] = -127
    assert torch.equal(ops.linear(x, ops.pack(weight)), (x.double() @ dense_of(weight).double().T).float())


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_groups_are_embedded(ops: Ops, generator: torch.Generator, bits: int) -> None:
    weight = quantize_grouped(torch.randn(37, 96, generator=generator), bits)
    weight.scales[0, 0], weight.offsets[1, 1] = 2**-24, -(2**-15)  # float16 without its leading one
    ids = torch.tensor([0, 36, 15, 16, 1])
    table = ops.pack(weight)
    assert isinstance(table, GroupedWeight)
    assert table.values.numel() == table.scales.numel() == 0
    torch.testing.assert_close(ops.embed(ids, table, torch.float32), REFERENCE.embed(ids, weight, torch.float32), rtol=1e-6, atol=1e-7)
    with pytest.raises(IndexError, match="vocabulary of 37"):
        ops.embed(torch.tensor([37]), table, torch.float32)


def test_packing_frees_the_rows_and_embed_still_reads_them(ops: Ops, generator: torch.Generator) -> None:
    weight = quantize_int8(torch.randn(37, 22, generator=generator))
    ids = torch.tensor([0, 36, 15, 16, 36])
    table = ops.pack(weight)
    assert isinstance(table, Int8Weight)
    assert table.values.numel() == 0
    assert torch.equal(ops.embed(ids, table, torch.float32), REFERENCE.embed(ids, weight, torch.float32))
    for bad in (-1, 37):
        with pytest.raises(IndexError, match="vocabulary of 37"):
            ops.embed(torch.tensor([0, bad]), table, torch.float32)


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("width", [3, 48, 92, 576])
def test_rms_norm(ops: Ops, generator: torch.Generator, has_residual: bool, width: int) -> None:
    x, weight = torch.randn(9, width, generator=generator), torch.randn(width, generator=generator)
    residual = torch.randn(9, width, generator=generator) if has_residual else None
    before = None if residual is None else residual.clone()
    normed, total = ops.rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = REFERENCE.rms_norm(x, before, weight, 1e-5)
    torch.testing.assert_close(normed, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(total, expected_total)
    assert residual is None or torch.equal(residual, before)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(ops: Ops, generator: torch.Generator, activation: str) -> None:
    gate_up = torch.randn(7, 2 * 23, generator=generator) * 8
    gate_up[0, :4] = torch.tensor([-200.0, 200.0, -90.0, 0.0])
    y = ops.gated(gate_up, activation)  # type: ignore[arg-type]
    torch.testing.assert_close(y, REFERENCE.gated(gate_up, activation), rtol=2e-6, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_norms", [False, True])
def test_kv_write_and_padding_that_writes_nothing(ops: Ops, generator: torch.Generator, dtype: torch.dtype, has_norms: bool) -> None:
    weights = random_layer(generator, has_norms=has_norms)
    batch, positions = paged_batch(SLICES, 4, 40, generator)
    batch.slots[[1, 4]] = -1
    kv = random_kv(batch, (40, 2, 4, 48), dtype, generator)
    expected_kv, before = copied(kv), copied(kv)
    product = torch.randn(len(positions), 10 * 48, generator=generator)
    given = product.clone()
    q = ops.kv_write(product, weights, positions, kv)
    torch.testing.assert_close(q, REFERENCE.kv_write(product, weights, positions, expected_kv), **TOLERANCE)
    assert torch.equal(product, given)
    for ours, theirs, old in ((kv.keys, expected_kv.keys, before.keys), (kv.values, expected_kv.values, before.values)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype is torch.float32 else 2**-7, atol=1e-5, equal_nan=True)
        written = torch.zeros(40, 4, dtype=torch.bool)
        used = batch.slots[batch.slots >= 0]
        written[used // 4, used % 4] = True
        untouched = (~written)[:, None, :, None].expand_as(ours)
        assert torch.equal(ours[untouched].nan_to_num(7), old[untouched].nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("activation", "is_full"), [("silu", False), ("gelu_tanh", True)])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_coarse_ops(ops: Ops, generator: torch.Generator, dtype: torch.dtype, activation: str, is_full: bool, bits: int) -> None:
    weights = random_layer(generator, activation=activation, has_bias=is_full, has_norms=is_full, bits=bits)
    width = len(weights.attention_norm)
    ours = packed(weights, ops)
    batch, positions = paged_batch(SLICES, 4, 40, generator)
    kv = random_kv(batch, (40, 2, 4, 48), dtype, generator)
    expected_kv = copied(kv)
    x, residual = (torch.randn(len(positions), width, generator=generator) for _ in range(2))
    for given in (None, residual):
        q, total = ops.qkv(x, None if given is None else given.clone(), ours, positions, kv)
        expected_q, expected_total = REFERENCE.qkv(x, given, weights, positions, expected_kv)
        assert torch.equal(total, expected_total)
        torch.testing.assert_close(q, expected_q, **AFTER_QUANTISING)
        torch.testing.assert_close(kv.keys, expected_kv.keys, equal_nan=True, **AFTER_QUANTISING)
        torch.testing.assert_close(kv.values, expected_kv.values, equal_nan=True, **AFTER_QUANTISING)
    y = torch.randn(len(positions), 6 * 48, generator=generator)
    out, total = ops.out_mlp(y, residual.clone(), ours)
    expected, expected_total = REFERENCE.out_mlp(y, residual, weights)
    torch.testing.assert_close(total, expected_total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out, expected, **AFTER_QUANTISING)


def test_the_first_layer_does_not_hand_out_the_callers_tensor(ops: Ops, generator: torch.Generator) -> None:
    weights = packed(random_layer(generator), ops)
    batch, positions = paged_batch(SLICES, 4, 40, generator)
    x = torch.randn(len(positions), 92, generator=generator)
    given = x.clone()
    _, residual = ops.qkv(x, None, weights, positions, random_kv(batch, (40, 2, 4, 48), torch.float32, generator))
    ops.out_mlp(torch.randn(len(x), 6 * 48, generator=generator), residual, weights)
    assert torch.equal(x, given)


def test_dense_float32_and_bfloat16_layers_fall_back(ops: Ops, generator: torch.Generator) -> None:
    weights = dense(random_layer(generator))
    batch, positions = paged_batch(SLICES, 4, 40, generator)
    kv = random_kv(batch, (40, 2, 4, 48), torch.float32, generator)
    expected_kv = copied(kv)
    x = torch.randn(len(positions), 92, generator=generator)
    q, residual = ops.qkv(x, None, weights, positions, kv)
    expected_q, _ = REFERENCE.qkv(x, None, weights, positions, expected_kv)
    torch.testing.assert_close(q, expected_q, rtol=1e-4, atol=1e-4)
    y = torch.randn(len(positions), 6 * 48, generator=generator)
    torch.testing.assert_close(ops.out_mlp(y, residual, weights)[0], REFERENCE.out_mlp(y, residual, weights)[0], rtol=1e-4, atol=1e-4)
    half = ops.linear(x.bfloat16(), ops.pack(quantize_int8(torch.eye(92))))
    assert half.dtype is torch.bfloat16
    assert torch.equal(ops.gated(x.bfloat16(), "silu"), REFERENCE.gated(x.bfloat16(), "silu"))


def test_no_rows_at_all(ops: Ops, generator: torch.Generator) -> None:
    weight = ops.pack(quantize_int8(torch.randn(20, 12, generator=generator)))
    assert ops.linear(torch.empty(0, 12), weight).shape == (0, 20)
    assert ops.embed(torch.empty(0, dtype=torch.int64), weight, torch.float32).shape == (0, 12)
