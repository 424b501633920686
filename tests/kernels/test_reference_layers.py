"""The references of norm, gate, K/V write and product against torch's own layers or formulas written another way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.gated import cases as gated_cases
from kernels.gated.reference import gated
from kernels.kv_write import cases as kv_write_cases
from kernels.kv_write.reference import kv_write
from kernels.linear.reference import dense_of, embed, linear, quantize_grouped, quantize_int8
from kernels.norm import cases as norm_cases
from kernels.norm.reference import rms_norm
from kernels.ops import Int8Weight, select_ops

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in norm_cases.CASES if case.size != "bench"], ids=lambda case: case.name)
def test_norm_equals_torch(case: norm_cases.NormCase, dtype: torch.dtype) -> None:
    x, residual, weight, eps = norm_cases.build(case, dtype)
    normed, total = rms_norm(x, residual, weight, eps)
    assert normed.dtype == total.dtype == dtype
    assert torch.equal(total, x if residual is None else x + residual)
    expected = F.rms_norm(total.double(), (case.width,), weight.double(), eps)
    eps_of_dtype = torch.finfo(dtype).eps
    torch.testing.assert_close(normed.double(), expected, rtol=max(eps_of_dtype, 1e-12) * 8, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in gated_cases.CASES if case.size != "bench"], ids=lambda case: case.name)
def test_gated_equals_torch(case: gated_cases.GatedCase, dtype: torch.dtype) -> None:
    gate_up, activation = gated_cases.build(case, dtype)
    gate, up = gate_up[:, : case.width].double(), gate_up[:, case.width :].double()
    if activation == "silu":
        expected = gate * torch.sigmoid(gate) * up
    else:
        expected = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    got = gated(gate_up, activation)
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    floor = eps * float((gate * up).abs().max())  # 1 + tanh(u) loses one rounding of the whole product where tanh is near -1
    torch.testing.assert_close(got.double(), expected, rtol=eps * 8, atol=floor)


def test_gated_names_what_it_knows() -> None:
    with pytest.raises(ValueError, match="silu"):
        gated(torch.zeros(1, 4), "relu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "case", [case for case in kv_write_cases.CASES if case.size != "bench" and case.pool == "plain"], ids=lambda case: case.name
)
def test_kv_write_one_row_at_a_time(case: kv_write_cases.KVWriteCase) -> None:
    """Rotation as a complex product of (i, i + H / 2), norms by torch, places by division: row by row and head by head."""
    qkv, weights, positions, kv = kv_write_cases.build(case, torch.float32)
    q = kv_write(qkv, weights, positions, kv)
    keys, values = torch.zeros_like(kv.keys), torch.zeros_like(kv.values)
    half = case.head_width // 2

    def turned(row: torch.Tensor, norm: torch.Tensor | None, position: int) -> torch.Tensor:
        row = row if norm is None else F.rms_norm(row, (case.head_width,), norm, weights.spec.norm_eps)
        angle = torch.complex(weights.rotary[position, 0], weights.rotary[position, 1])
        product = torch.complex(row[:half], row[half:]) * angle
        return torch.cat((product.real, product.imag))

    for token, slot in enumerate(kv.batch.slots.tolist()):
        heads = qkv[token].view(-1, case.head_width)
        for head in range(case.num_heads):
            torch.testing.assert_close(q[token, head], turned(heads[head], weights.q_norm, int(positions[token])))
        for head in range(case.num_kv_heads if slot >= 0 else 0):
            key = turned(heads[case.num_heads + head], weights.k_norm, int(positions[token]))
            keys[slot // case.block_size, head, slot % case.block_size] = key
            values[slot // case.block_size, head, slot % case.block_size] = heads[case.num_heads + case.num_kv_heads + head]
    torch.testing.assert_close(kv.keys, keys)
    assert torch.equal(kv.values, values)


def test_quantised_rows_are_within_half_a_step() -> None:
    torch.manual_seed(0)
    dense = torch.randn(7, 50) * torch.logspace(-3, 3, 7)[:, None]
    dense[3] = 0
    weight = quantize_int8(dense)
    assert (weight.out_features, weight.in_features) == (7, 50)
    assert weight.values.dtype == torch.int8
    assert weight.scales.dtype == torch.float32
    error = (weight.values * weight.scales[:, None] - dense).abs()
    assert bool((error <= weight.scales[:, None] * 0.5001).all())
    assert weight.values.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127, 127]


@pytest.mark.parametrize("bits", [4, 8])
def test_grouped_numbers_are_near_the_dense_ones(bits: int) -> None:
    torch.manual_seed(0)
    dense = torch.randn(7, 96) * torch.logspace(-3, 3, 7)[:, None]
    dense[3] = 0
    weight = quantize_grouped(dense, bits)
    assert (weight.bits, weight.values.dtype, tuple(weight.scales.shape)) == (bits, torch.uint8, (7, 3))
    assert int(weight.values.max()) <= 2**bits - 1
    groups = dense.view(7, 3, 32)
    whole_range = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)  # the step that reaches both ends
    error = (dense_of(weight) - dense).view(7, 3, 32).square().sum(-1)
    assert bool((error <= 32 * (0.51 * whole_range) ** 2).all())
    assert torch.equal(dense_of(weight)[3], dense[3])


def test_grids_that_cut_ends_off_are_better_than_whole_ranges() -> None:
    torch.manual_seed(0)
    dense = torch.randn(200, 96)
    groups = dense.view(200, 3, 32)
    least, step = groups.amin(-1, keepdim=True), (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    whole = torch.round((groups - least) / step) * step + least
    found = dense_of(quantize_grouped(dense, 4)).view_as(groups)
    assert float((found - groups).square().sum()) < 0.93 * float((whole - groups).square().sum())


@pytest.mark.parametrize("bits", [4, 8])
def test_grouped_product_is_near_the_dense_one_and_rows_are_independent(bits: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(9, 320)
    x[:, 7] *= 100  # one scale a row would leave the others a few levels
    weight = quantize_grouped(torch.randn(40, 320), bits)
    together, expected = linear(x, weight), x @ dense_of(weight).T
    assert float((together - expected).norm() / expected.norm()) < 0.02
    for row in range(9):
        torch.testing.assert_close(linear(x[row : row + 1], weight), together[row : row + 1], rtol=1e-5, atol=1e-5)
    assert torch.equal(embed(torch.tensor([3, 39]), weight, torch.float32), dense_of(weight)[[3, 39]])


def test_int8_product_is_exact_where_float32_is_not() -> None:
    """4096 products of 127 * 126 are past 2 ** 24; the sum must still be the whole number it is."""
    depth = 4096
    values = torch.full((2, depth), 127, dtype=torch.int8)
    values[1, 0] = 126
    weight = Int8Weight(2, depth, values, torch.ones(2))
    x = torch.full((1, depth), 127.0, dtype=torch.float64)
    x[0, 1] = 126.0
    expected = [127 * 127 * (depth - 1) + 127 * 126, 127 * 127 * (depth - 2) + 127 * 126 * 2]
    assert linear(x, weight).tolist() == [expected]


def test_int8_product_is_near_the_dense_one_and_rows_are_independent() -> None:
    torch.manual_seed(1)
    dense, x = torch.randn(40, 300), torch.randn(9, 300)
    weight = quantize_int8(dense)
    together = linear(x, weight)
    assert float((together - x @ dense.T).norm() / (x @ dense.T).norm()) < 0.02
    for row in range(9):
        assert torch.equal(linear(x[row : row + 1], weight), together[row : row + 1])
    assert linear(x.bfloat16(), weight).dtype == torch.bfloat16


def test_embed_takes_rows_of_either_kind() -> None:
    torch.manual_seed(2)
    dense, ids = torch.randn(20, 8), torch.tensor([3, 3, 19, 0])
    assert torch.equal(embed(ids, dense, torch.bfloat16), dense[ids].bfloat16())
    weight = quantize_int8(dense)
    got = embed(ids, weight, torch.float32)
    assert float((got - dense[ids]).abs().max()) <= float(weight.scales.max()) / 2 * 1.001
    assert got.dtype == torch.float32


def test_coarse_ops_are_their_compositions() -> None:
    """The coarse ops of the reference back end against a layer written out with torch alone, bias included."""
    case = next(case for case in kv_write_cases.CASES if case.name == "normed")
    _, weights, positions, kv = kv_write_cases.build(case, torch.float64)
    torch.manual_seed(3)
    width, hidden, heads = 24, 40, case.num_heads + 2 * case.num_kv_heads

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    fields = {name: getattr(weights, name) for name in ("spec", "rotary", "q_norm", "k_norm")}
    weights = type(weights)(
        attention_norm=normal(width),
        qkv=normal(heads * case.head_width, width),
        out=normal(width, case.num_heads * case.head_width),
        mlp_norm=normal(width),
        gate_up=normal(2 * hidden, width),
        down=normal(width, hidden),
        qkv_bias=normal(heads * case.head_width),
        **fields,
    )
    ops = select_ops("reference")
    x, before = normal(case.num_tokens, width), normal(case.num_tokens, width)
    q, residual = ops.qkv(x, before, weights, positions, kv)
    assert isinstance(weights.qkv, torch.Tensor)
    assert isinstance(weights.out, torch.Tensor)
    assert isinstance(weights.gate_up, torch.Tensor)
    assert isinstance(weights.down, torch.Tensor)
    normed = F.rms_norm(x + before, (width,), weights.attention_norm, weights.spec.norm_eps)
    torch.testing.assert_close(residual, x + before)
    torch.testing.assert_close(q, kv_write(F.linear(normed, weights.qkv, weights.qkv_bias), weights, positions, kv))
    y = normal(case.num_tokens, case.num_heads * case.head_width)
    got, after = ops.out_mlp(y, residual, weights)
    total = residual + y @ weights.out.T
    inner = F.rms_norm(total, (width,), weights.mlp_norm, weights.spec.norm_eps) @ weights.gate_up.T
    torch.testing.assert_close(after, total)
    torch.testing.assert_close(got, (F.silu(inner[:, :hidden]) * inner[:, hidden:]) @ weights.down.T)
