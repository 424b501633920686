"""Products on the GPU by every kind of weight, here by int8 rows: rows of x become int8 too, then whole numbers are multiplied exactly.

Dense products are `dense_triton`'s; numbers in groups and 8-bit floats have files of their own. No model here. Called by `triton_ops`.
Shape suffixes: M rows of x, T tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear import dense_triton, fp8_triton, grouped_triton, reference
from kernels.linear.fp8_triton import linear_fp8, pack_fp8
from kernels.linear.grouped_triton import embed_grouped, linear_grouped, pack_groups
from kernels.linear.split_triton import add_up, arrivals, split_inputs
from kernels.ops import Fp8Weight, GroupedWeight, Int8Weight, Weight

COLUMNS, DEPTH = 64, 128
"""Output columns and input columns of a small tile. Sums are whole numbers, so tiles may follow M without changing a bit of a result."""
FEW_ROWS = 32
"""Of x, for which the inputs are split: with so little to do for each number, more programs have to be reading. A tile of 64 rows would
need more registers than there are."""
FUSED_ROWS, FUSED_DEPTH, FUSED_NUMBERS = 8, 2048, 8192
"""Rows, inputs and numbers of x up to which every program quantises x itself: all of it is then asked for at once, which takes less than
another launch."""


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [M, in] by the weight's rows, [M, out] in x's dtype."""
    if isinstance(weight, Tensor):
        return dense_triton.fastest(x, weight)
    if isinstance(weight, GroupedWeight):
        return linear_grouped(x, weight)
    if isinstance(weight, Fp8Weight):
        return linear_fp8(x, weight)
    return _linear_int8(x.contiguous(), weight)


def deterministic_linear(x: Tensor, weight: Weight) -> Tensor:
    """As `linear`, and a row's bits depend on no other row, nor on how many there are."""
    if isinstance(weight, Tensor):
        return dense_triton.deterministic(x, weight)
    if isinstance(weight, Int8Weight):  # whole numbers are summed exactly
        return linear(x, weight)
    most = grouped_triton.MOST_ROWS if isinstance(weight, GroupedWeight) else fp8_triton.MOST_ROWS
    return torch.cat([linear(part, weight) for part in x.split(most)])


def pack(weight: Weight) -> Weight:
    """Numbers in groups come in words that are read in one piece; the others stay as they are, and get what their kernels count on."""
    if isinstance(weight, GroupedWeight):
        return pack_groups(weight)
    if isinstance(weight, Fp8Weight):
        return pack_fp8(weight)
    if isinstance(weight, Int8Weight):
        return replace(weight, packed=arrivals(triton.cdiv(weight.out_features, COLUMNS), weight.values.device))
    return weight


def embed(ids_T: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """The rows of a table at int64 ids, [T, D] in `dtype`."""
    if isinstance(weight, GroupedWeight) and weight.packed is not None:
        return embed_grouped(ids_T, weight, dtype)
    return reference.embed(ids_T, weight, dtype)


def _linear_int8(x: Tensor, weight: Int8Weight) -> Tensor:
    num_rows, depth = x.shape
    out = torch.empty((num_rows, weight.out_features), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    if num_rows <= FUSED_ROWS and depth <= FUSED_DEPTH and num_rows * depth <= FUSED_NUMBERS:
        _multiply_few(fused_int8_kernel, (x,), weight, out)
        return out
    values = torch.empty((num_rows, depth), dtype=torch.int8, device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(depth)
    quantize_kernel[(num_rows,)](x, values, scales, IN=depth, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    if num_rows <= FEW_ROWS:
        _multiply_few(few_int8_kernel, (values, scales), weight, out)
        return out
    rows, columns, warps = (64, COLUMNS, 4) if num_rows <= 64 else (128, 128, 8)
    int8_kernel[(triton.cdiv(num_rows, rows), triton.cdiv(weight.out_features, columns))](
        values,
        weight.values,
        scales,
        weight.scales,
        out,
        num_rows,
        OUT=weight.out_features,
        IN=depth,
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=DEPTH,
        num_warps=warps,
        num_stages=3,
    )
    return out


def _multiply_few(kernel: Any, x: tuple[Tensor, ...], weight: Int8Weight, out: Tensor) -> None:
    """x: as the kernel wants it, quantised or not."""
    num_rows, depth = x[0].shape
    num_tiles = triton.cdiv(weight.out_features, COLUMNS)
    done = weight.packed if isinstance(weight.packed, Tensor) else arrivals(num_tiles, out.device)
    split = split_inputs(num_tiles, triton.cdiv(depth, DEPTH))
    partials = torch.empty((split.count if split.count > 1 else 0, num_rows, weight.out_features), dtype=torch.int32, device=out.device)
    kernel[(num_tiles, split.count)](
        *x,
        weight.values,
        weight.scales,
        out,
        partials,
        done,
        num_rows,
        OUT=weight.out_features,
        IN=depth,
        ROWS=max(8, triton.next_power_of_2(num_rows)),
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        CHUNKS=split.chunks,
        SPLITS=split.count,
        num_warps=2,
        num_stages=4,
    )


@triton.jit
def scale_of(most):
    """Of a row whose absolute maximum is given."""
    scale = tl.div_rn(most, 127.0)
    return tl.where(scale > 0, scale, 1.0)


@triton.jit
def quantised(x, scale):
    ratio = tl.div_rn(x, scale)
    # Adding and taking away 1.5 * 2 ** 23 rounds to the nearest whole number, ties to even, in plain float32 arithmetic.
    rounded = (ratio + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8)


@triton.jit
def quantize_kernel(x_ptr, values_ptr, scales_ptr, IN: tl.constexpr, BLOCK: tl.constexpr):
    """One row: scale = absolute maximum / 127 (1 for a row of zeros), values rounded to the nearest, ties to even."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_column = column < IN
    x = tl.load(x_ptr + row * IN + column, mask=is_column, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(x), 0))
    tl.store(values_ptr + row * IN + column, quantised(x, scale), mask=is_column)
    tl.store(scales_ptr + row, scale)


@triton.jit(do_not_specialize=["num_rows"])
def int8_kernel(
    x_ptr, weight_ptr, x_scales_ptr, weight_scales_ptr, out_ptr, num_rows,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of the output: an int32 sum, then (sum * scale of the row) * scale of the column, in this order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    is_row, is_column = row < num_rows, column < OUT
    x_at = x_ptr + row.to(tl.int64)[:, None] * IN + depth[None, :]
    weight_at = weight_ptr + column.to(tl.int64)[:, None] * IN + depth[None, :]
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
    for start in range(0, IN, DEPTH):
        inside = (start + depth < IN)[None, :]
        x = tl.load(x_at + start, mask=is_row[:, None] & inside, other=0)
        weight = tl.load(weight_at + start, mask=is_column[:, None] & inside, other=0)
        total = tl.dot(x, tl.trans(weight), total, out_dtype=tl.int32)
    x_scale = tl.load(x_scales_ptr + row, mask=is_row, other=0.0)
    weight_scale = tl.load(weight_scales_ptr + column, mask=is_column, other=0.0)
    y = total.to(tl.float32) * x_scale[:, None] * weight_scale[None, :]
    at = out_ptr + row.to(tl.int64)[:, None] * OUT + column[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def few_int8_kernel(
    x_ptr, x_scales_ptr, weight_ptr, weight_scales_ptr, out_ptr, partials_ptr, arrivals_ptr, num_rows,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    CHUNKS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The same for few rows, over one split of the inputs. Outputs stand in the tile's rows: eight rows of x are enough for a product."""
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    depth = tl.arange(0, DEPTH)
    is_row, is_column = row < num_rows, column < OUT
    x_at = x_ptr + row.to(tl.int64)[None, :] * IN + depth[:, None]
    weight_at = weight_ptr + column.to(tl.int64)[:, None] * IN + depth[None, :]
    first = split * CHUNKS
    total = tl.zeros([COLUMNS, ROWS], dtype=tl.int32)
    for chunk in range(first, tl.minimum(first + CHUNKS, tl.cdiv(IN, DEPTH))):
        start = chunk * DEPTH
        inside = start + depth < IN
        weight = tl.load(weight_at + start, mask=is_column[:, None] & inside[None, :], other=0)
        x = tl.load(x_at + start, mask=is_row[None, :] & inside[:, None], other=0)
        total = tl.dot(weight, x, total, out_dtype=tl.int32)
    at = row[None, :] * OUT + column[:, None]
    is_inside = is_row[None, :] & is_column[:, None]
    total, is_last = add_up(total, partials_ptr, arrivals_ptr + tl.program_id(0), at, is_inside, num_rows.to(tl.int64) * OUT, split, SPLITS)
    x_scale = tl.load(x_scales_ptr + row, mask=is_row, other=0.0)
    weight_scale = tl.load(weight_scales_ptr + column, mask=is_column, other=0.0)
    y = total.to(tl.float32) * x_scale[None, :] * weight_scale[:, None]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=is_inside & is_last)


@triton.jit(do_not_specialize=["num_rows"])
def fused_int8_kernel(
    x_ptr, weight_ptr, weight_scales_ptr, out_ptr, partials_ptr, arrivals_ptr, num_rows,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    CHUNKS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The same from rows that are not quantised yet: every program finds their scales, then quantises the inputs of its split."""
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    depth = tl.arange(0, DEPTH)
    is_row, is_column = row < num_rows, column < OUT
    x_at = x_ptr + row.to(tl.int64)[None, :] * IN + depth[:, None]
    weight_at = weight_ptr + column.to(tl.int64)[:, None] * IN + depth[None, :]
    most = tl.zeros([DEPTH, ROWS], dtype=tl.float32)
    for begin in tl.static_range(0, IN, DEPTH):
        part = tl.load(x_at + begin, mask=is_row[None, :] & (begin + depth < IN)[:, None], other=0.0)
        most = tl.maximum(most, tl.abs(part.to(tl.float32)))
    x_scale = scale_of(tl.max(most, 0))
    first = split * CHUNKS
    total = tl.zeros([COLUMNS, ROWS], dtype=tl.int32)
    for chunk in range(first, tl.minimum(first + CHUNKS, tl.cdiv(IN, DEPTH))):
        start = chunk * DEPTH
        inside = start + depth < IN
        weight = tl.load(weight_at + start, mask=is_column[:, None] & inside[None, :], other=0)
        x = tl.load(x_at + start, mask=is_row[None, :] & inside[:, None], other=0.0)
        total = tl.dot(weight, quantised(x.to(tl.float32), x_scale[None, :]), total, out_dtype=tl.int32)
    at = row[None, :] * OUT + column[:, None]
    is_inside = is_row[None, :] & is_column[:, None]
    total, is_last = add_up(total, partials_ptr, arrivals_ptr + tl.program_id(0), at, is_inside, num_rows.to(tl.int64) * OUT, split, SPLITS)
    weight_scale = tl.load(weight_scales_ptr + column, mask=is_column, other=0.0)
    y = total.to(tl.float32) * x_scale[None, :] * weight_scale[:, None]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=is_inside & is_last)
