"""Products by int8 weights on the GPU: rows of x become int8 by their own scale, then whole numbers are multiplied exactly.

Dense products are `dense_triton`'s. No model here. Called by `triton_ops`.
Shape suffixes: M rows of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear import dense_triton, reference
from kernels.ops import GroupedWeight, Int8Weight, Weight

COLUMNS, DEPTH = 64, 128
"""Output columns and input columns of one tile. Sums are whole numbers, so tiles may follow M without changing a bit of a result."""


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [M, in] by the weight's rows, [M, out] in x's dtype."""
    if isinstance(weight, Tensor):
        return dense_triton.fastest(x, weight)
    if isinstance(weight, GroupedWeight):  # no kernel yet
        return reference.linear(x, weight)
    return _linear_int8(x.contiguous(), weight)


def deterministic_linear(x: Tensor, weight: Weight) -> Tensor:
    """As `linear`, and a row's bits depend on no other row by dense matrices either (by quantised ones they never do)."""
    return dense_triton.deterministic(x, weight) if isinstance(weight, Tensor) else linear(x, weight)


def _linear_int8(x: Tensor, weight: Int8Weight) -> Tensor:
    num_rows, depth = x.shape
    out = torch.empty((num_rows, weight.out_features), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    values = torch.empty((num_rows, depth), dtype=torch.int8, device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(depth)
    quantize_kernel[(num_rows,)](x, values, scales, IN=depth, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    rows = 16 if num_rows <= 16 else 64
    int8_kernel[(triton.cdiv(num_rows, rows), triton.cdiv(weight.out_features, COLUMNS))](
        values,
        weight.values,
        scales,
        weight.scales,
        out,
        num_rows,
        OUT=weight.out_features,
        IN=depth,
        ROWS=rows,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        num_warps=4,
        num_stages=3,
    )
    return out


@triton.jit
def quantize_kernel(x_ptr, values_ptr, scales_ptr, IN: tl.constexpr, BLOCK: tl.constexpr):
    """One row: scale = absolute maximum / 127 (1 for a row of zeros), values rounded to the nearest, ties to even."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_column = column < IN
    x = tl.load(x_ptr + row * IN + column, mask=is_column, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), 0), 127.0)
    scale = tl.where(scale > 0, scale, 1.0)
    ratio = tl.div_rn(x, scale)
    # Adding and taking away 1.5 * 2 ** 23 rounds to the nearest whole number, ties to even, in plain float32 arithmetic.
    rounded = (ratio + 12582912.0) - 12582912.0
    rounded = tl.minimum(tl.maximum(rounded, -127.0), 127.0)
    tl.store(values_ptr + row * IN + column, rounded.to(tl.int8), mask=is_column)
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
