"""Coarse ops of a decode step of at most 16 rows over dense matrices: a layer in four products and what attention takes.

No model here. Called by `triton_ops`, which puts `fused` over the composed ops; what these kernels can't do goes to the composed ones:
more rows, quantised matrices, float16 (a row that is not normed yet can leave its range). Quantised pools and norms of heads get their
own write behind the product.
Sums that the composed ops round between two kernels are rounded once here.
Shape suffixes: T tokens, D model width, F feed-forward width, N query heads, K key/value heads, H head width, P places in a block;
in kernels C lines of the matrix in a program and M padded rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeGuard

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import begin, can_depend
from kernels.gated.triton import activated
from kernels.kv_write.triton import _rotated, _stored
from kernels.linear.narrow_triton import MAX_ROWS, Tiling, normed_lane_sum, padded_rows, prefetch_lines, product, tiling_of
from kernels.ops import LayerWeights, Ops, PagedKV, Weight

POOLS = (torch.float32, torch.float16, torch.bfloat16)


def fused(ops: Ops) -> Ops:
    """The back end with the coarse ops of this file in front of its own. A row's last bits may differ from those it has among more than
    sixteen, where the composed ops take it."""
    return replace(ops, qkv=_qkv_in_front_of(ops), out_mlp=_out_mlp_in_front_of(ops))


def _qkv_in_front_of(ops: Ops) -> Callable[..., tuple[Tensor, Tensor]]:
    def qkv(x_TD: Tensor, residual_TD: Tensor | None, weights: LayerWeights, positions_T: Tensor, kv: PagedKV) -> tuple[Tensor, Tensor]:
        if not _is_narrow(weights.qkv, x_TD):
            return ops.qkv(x_TD, residual_TD, weights, positions_T, kv)
        if can_write(weights, kv):
            return normed_qkv(x_TD, residual_TD, weights, positions_T, kv)
        rows, residual = normed_product(x_TD, residual_TD, weights)
        return ops.kv_write(rows, weights, positions_T, kv), residual

    return qkv


def _out_mlp_in_front_of(ops: Ops) -> Callable[..., tuple[Tensor, Tensor]]:
    def out_mlp(y: Tensor, residual_TD: Tensor, weights: LayerWeights) -> tuple[Tensor, Tensor]:
        out, down, eps = weights.out, weights.down, weights.spec.norm_eps
        gate_up = weights.gate_up
        if weights.experts is not None or not (_is_narrow(out, y) and _is_narrow(gate_up, y) and _is_narrow(down, y)):
            return ops.out_mlp(y, residual_TD, weights)
        if weights.out_norm is None:
            hidden, residual = normed_gate_up(product(y, out, residual=residual_TD.contiguous()), None, weights)
        else:
            hidden, residual = normed_gate_up(ops.rms_norm(product(y, out), None, weights.out_norm, eps)[0], residual_TD, weights)
        x = product(hidden, down)
        return x if weights.down_norm is None else ops.rms_norm(x, None, weights.down_norm, eps)[0], residual

    return out_mlp


def _is_narrow(weight: Weight, x: Tensor) -> TypeGuard[Tensor]:
    return isinstance(weight, Tensor) and 0 < len(x) <= MAX_ROWS and x.dtype == weight.dtype == torch.bfloat16 and weight.is_contiguous()


def can_write(weights: LayerWeights, kv: PagedKV) -> bool:
    """Whether `normed_qkv` can store what it computes: heads without norms, a pool of plain numbers."""
    is_plain = kv.key_scales is None and kv.value_scales is None and kv.keys.dtype in POOLS and kv.values.dtype == kv.keys.dtype
    has_strides = kv.keys.stride() == kv.values.stride() and kv.keys.stride(3) == 1 and weights.rotary.is_contiguous()
    has_norms = weights.q_norm is not None or weights.k_norm is not None
    return is_plain and has_strides and not has_norms and weights.spec.head_width % 16 == 0


def normed_qkv(x_TD: Tensor, residual_TD: Tensor | None, weights: LayerWeights, positions_T: Tensor, kv: PagedKV) -> tuple[Tensor, Tensor]:
    """(q [T, N, H], residual [T, D]) as `Ops.qkv`, in one kernel; 1 <= T <= 16, where `can_write` says so.

    Mutates: kv.keys, kv.values at the batch's slots; a slot of -1 writes nothing. The residual that comes back is a new tensor.
    """
    spec, matrix = weights.spec, weights.qkv
    assert isinstance(matrix, Tensor)
    x_TD, total, given = _with_total(x_TD, residual_TD)
    q = torch.empty((len(x_TD), spec.num_heads, spec.head_width), dtype=x_TD.dtype, device=x_TD.device)
    tiling = _tiling_of(len(matrix))
    pairs = tiling.columns // 2
    while spec.head_width // 2 % pairs:
        pairs //= 2
    tiling = replace(tiling, columns=2 * pairs)
    qkv_kernel[(len(matrix) // tiling.columns,)](
        x_TD,
        given,
        weights.attention_norm,
        None if given is None else total,
        matrix,
        weights.qkv_bias,
        q,
        kv.keys,
        kv.values,
        kv.batch.slots,
        positions_T,
        weights.rotary,
        len(x_TD),
        *kv.keys.stride()[:3],
        spec.norm_eps,
        N=spec.num_heads,
        H=spec.head_width,
        P=kv.keys.shape[2],
        **_tile(tiling, x_TD),
    )
    return q, total


def normed_product(x_TD: Tensor, residual_TD: Tensor | None, weights: LayerWeights) -> tuple[Tensor, Tensor]:
    """(rows [T, (N + 2K) * H] of the q/k/v product with its bias, residual [T, D], a new tensor); 1 <= T <= 16."""
    matrix = weights.qkv
    assert isinstance(matrix, Tensor)
    x_TD, total, given = _with_total(x_TD, residual_TD)
    out_features = len(matrix)
    out = torch.empty((len(x_TD), out_features), dtype=x_TD.dtype, device=x_TD.device)
    tiling = _tiling_of(out_features)
    normed_kernel[(triton.cdiv(out_features, tiling.columns),)](
        x_TD,
        given,
        weights.attention_norm,
        None if given is None else total,
        matrix,
        weights.qkv_bias,
        out,
        len(x_TD),
        weights.spec.norm_eps,
        OUT=out_features,
        **_tile(tiling, x_TD),
    )
    return out, total


def normed_gate_up(x_TD: Tensor, residual_TD: Tensor | None, weights: LayerWeights) -> tuple[Tensor, Tensor]:
    """(activation(gate) * up of the RMSNorm of x + residual [T, F], residual [T, D]: a new tensor, x itself without one); 1 <= T <= 16."""
    matrix, spec = weights.gate_up, weights.spec
    assert isinstance(matrix, Tensor)
    x_TD, total, given = _with_total(x_TD, residual_TD)
    width = len(matrix) // 2
    out = torch.empty((len(x_TD), width), dtype=x_TD.dtype, device=x_TD.device)
    tiling = _tiling_of(len(matrix))
    gate_up_kernel[(triton.cdiv(width, tiling.columns // 2),)](
        x_TD,
        given,
        weights.mlp_norm,
        None if given is None else total,
        matrix,
        out,
        len(x_TD),
        spec.norm_eps,
        F=width,
        IS_GELU=spec.activation == "gelu_tanh",
        **_tile(tiling, x_TD),
    )
    return out, total


def _tiling_of(out_features: int) -> Tiling:
    """Wider programs than a plain product's: each works on all the rows of x by itself, which has to pay."""
    tiling = tiling_of(out_features)
    return Tiling(columns=32, lanes=4, num_warps=4, num_stages=4) if tiling.columns == 16 and out_features >= 4096 else tiling


def _with_total(x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, where x + residual goes, the residual): without a residual the sum is x itself."""
    x_TD = x_TD.contiguous()
    if residual_TD is None:
        return x_TD, x_TD, None
    return x_TD, torch.empty_like(x_TD), residual_TD.contiguous()


def _tile(tiling: Tiling, x_TD: Tensor) -> dict[str, Any]:
    """What every kernel here is launched with."""
    is_dependent = can_depend(x_TD.device)
    return {
        "IN": x_TD.shape[1],
        "COLUMNS": tiling.columns,
        "LANES": tiling.lanes,
        "ROWS": padded_rows(len(x_TD)),
        "DEPENDENT": is_dependent,
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
        "launch_pdl": is_dependent,
    }


@triton.jit
def _halves(y_CM, HALF: tl.constexpr, ROWS: tl.constexpr):
    """The first and the second half of a program's lines, each [M, C / 2]."""
    return tl.split(tl.permute(tl.reshape(y_CM, (2, HALF, ROWS)), (2, 1, 0)))


@triton.jit(do_not_specialize=["num_rows"])
def normed_kernel(
    x_ptr, residual_ptr, norm_ptr, total_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, eps,
    OUT: tl.constexpr, IN: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Some columns of the normed rows by the matrix, plus bias. residual_ptr and total_ptr may be None together, bias_ptr alone."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    line = tl.minimum(column, OUT - 1)
    prefetch_lines(weight_ptr, line, 0, IN, 4 * LANES, DEPENDENT)
    begin(DEPENDENT)
    is_writer = tl.program_id(0) == 0
    y = normed_lane_sum(
        x_ptr, residual_ptr, norm_ptr, total_ptr, weight_ptr, line, num_rows, is_writer, eps, IN, LANES, ROWS, IN % (LANES * 64) == 0
    )
    y = tl.trans(y)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + line).to(tl.float32)[None, :]
    row = tl.arange(0, ROWS)
    written = (row < num_rows)[:, None] & (column < OUT)[None, :]
    tl.store(out_ptr + row[:, None] * OUT + column[None, :], y.to(out_ptr.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["num_rows"])
def gate_up_kernel(
    x_ptr, residual_ptr, norm_ptr, total_ptr, weight_ptr, out_ptr, num_rows, eps,
    F: tl.constexpr, IS_GELU: tl.constexpr, IN: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Some columns of the gated hidden layer: their gate lines and their up lines are the two halves of the program's lines.

    residual_ptr and total_ptr may be None together.
    """
    HALF: tl.constexpr = COLUMNS // 2
    index = tl.arange(0, COLUMNS)
    line = (index // HALF) * F + tl.minimum(tl.program_id(0) * HALF + index % HALF, F - 1)
    prefetch_lines(weight_ptr, line, 0, IN, 4 * LANES, DEPENDENT)
    begin(DEPENDENT)
    is_writer = tl.program_id(0) == 0
    y = normed_lane_sum(
        x_ptr, residual_ptr, norm_ptr, total_ptr, weight_ptr, line, num_rows, is_writer, eps, IN, LANES, ROWS, IN % (LANES * 64) == 0
    )
    gate, up = _halves(y, HALF, ROWS)
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * HALF + tl.arange(0, HALF)
    written = (row < num_rows)[:, None] & (column < F)[None, :]
    hidden = activated(gate, IS_GELU) * up
    tl.store(out_ptr + row[:, None] * F + column[None, :], hidden.to(out_ptr.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["num_rows"])
def qkv_kernel(
    x_ptr, residual_ptr, norm_ptr, total_ptr, weight_ptr, bias_ptr, q_ptr, k_ptr, v_ptr, slots_ptr, positions_ptr, rotary_ptr,
    num_rows, stride_block, stride_head, stride_place, eps,
    N: tl.constexpr, H: tl.constexpr, P: tl.constexpr, IN: tl.constexpr,
    COLUMNS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Some pairs of one head, which rotation pairs: low and high halves are the two halves of the program's lines.

    Heads come in the order query, key, value; how many there are follows from the number of programs. residual_ptr and total_ptr may be
    None together, bias_ptr alone. The pool's blocks may be strided; offsets into it are 64-bit.
    """
    HALF: tl.constexpr = COLUMNS // 2
    head = tl.program_id(0) // (H // COLUMNS)
    pair = tl.program_id(0) % (H // COLUMNS) * HALF + tl.arange(0, HALF)
    index = tl.arange(0, COLUMNS)
    line = head * H + (index // HALF) * (H // 2) + tl.program_id(0) % (H // COLUMNS) * HALF + index % HALF
    prefetch_lines(weight_ptr, line, 0, IN, 4 * LANES, DEPENDENT)
    begin(DEPENDENT)
    is_writer = tl.program_id(0) == 0
    y = normed_lane_sum(
        x_ptr, residual_ptr, norm_ptr, total_ptr, weight_ptr, line, num_rows, is_writer, eps, IN, LANES, ROWS, IN % (LANES * 64) == 0
    )
    if bias_ptr is not None:
        y += tl.load(bias_ptr + line).to(tl.float32)[:, None]
    low, high = _halves(y, HALF, ROWS)
    row = tl.arange(0, ROWS)
    is_row = row < num_rows
    readable = is_row[:, None] & (pair < H // 2)[None, :]
    num_kv_heads = (tl.num_programs(0) // (H // COLUMNS) - N) // 2
    if head < N + num_kv_heads:
        position = tl.load(positions_ptr + row, mask=is_row, other=0).to(tl.int64)
        low, high = _rotated(low, high, rotary_ptr, position, pair, readable, H)
    if head < N:
        _stored(low, high, q_ptr + (row[:, None] * N + head) * H + pair[None, :], readable, H)
    else:
        slot = tl.load(slots_ptr + row, mask=is_row, other=-1).to(tl.int64)
        place = (slot // P) * stride_block + (slot % P) * stride_place
        written = (slot >= 0)[:, None] & (pair < H // 2)[None, :]
        if head < N + num_kv_heads:
            _stored(low, high, k_ptr + (head - N).to(tl.int64) * stride_head + place[:, None] + pair[None, :], written, H)
        else:
            _stored(low, high, v_ptr + (head - N - num_kv_heads).to(tl.int64) * stride_head + place[:, None] + pair[None, :], written, H)
