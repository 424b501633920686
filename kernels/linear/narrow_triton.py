"""Products of at most 16 rows by a dense matrix on the GPU: limited by how fast the matrix is read, so all is arranged for that.

No model here. Called by `dense_triton` and `fused_triton`, which share `lane_sum`, `normed_lane_sum` and the tiles.
A program computes some output columns over the whole depth. Its warps are lanes: each multiplies every LANES-th stretch of DEPTH inputs
(a batched product), because one warp's chain of dependent tensor operations is slower than memory; lanes are added at the end. Columns
of a program are few, so that even a small matrix is read by most multiprocessors, and no sum is ever split between programs: merging
through memory costs more than the 1 or 2 us in which such a matrix is read.
Shape suffixes in comments: C output columns of a program, L lanes, M rows of x (padded to 8 or 16), D inputs of a lane's stretch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import begin, can_depend, prefetch

MAX_ROWS = 16


@dataclass(frozen=True, slots=True)
class Tiling:
    """columns of a program, lanes, stages in flight; a lane is a warp, or two where a program has 64 columns."""

    columns: int
    lanes: int
    num_warps: int
    num_stages: int


CANDIDATES = (
    Tiling(columns=16, lanes=8, num_warps=8, num_stages=5),
    Tiling(columns=16, lanes=4, num_warps=4, num_stages=5),
    Tiling(columns=32, lanes=4, num_warps=4, num_stages=4),
    Tiling(columns=64, lanes=2, num_warps=4, num_stages=4),
    Tiling(columns=16, lanes=16, num_warps=16, num_stages=3),
    Tiling(columns=16, lanes=4, num_warps=4, num_stages=8),
    Tiling(columns=32, lanes=8, num_warps=8, num_stages=4),
    Tiling(columns=64, lanes=4, num_warps=8, num_stages=3),
)
"""What a measurement on a GPU should try for each shape; the first four are in use."""


def tiling_of(out_features: int) -> Tiling:
    """By output columns alone. At least 64 KB in flight on each of 132 multiprocessors, or near it where the matrix is small.

    Not yet measured on a GPU: chosen from the bytes in flight that 4.3 TB/s at about 1 us need (4 MB), with room for the next kernel.
    """
    return next((CANDIDATES[index] for index, least in enumerate((2048, 8192, 32768)) if out_features < least), CANDIDATES[3])


def padded_rows(num_rows: int) -> int:
    return 8 if num_rows <= 8 else MAX_ROWS


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, tiling: Tiling | None = None) -> Tensor:
    """x [M, in] by the rows of weight [out, in], M <= 16, plus bias [out] and residual [M, out], rounded once: [M, out] in x's dtype.

    tiling: another than `tiling_of` gives, to be measured. Raises: ValueError for more rows.
    Mutates: residual, when given: the sum is put there, and it is returned.
    """
    num_rows, depth = x.shape
    if num_rows > MAX_ROWS:
        raise ValueError(f"{num_rows} rows; at most {MAX_ROWS}")
    x, out_features = x.contiguous(), weight.shape[0]
    out = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device) if residual is None else residual
    if num_rows:
        tiling, is_dependent = tiling or tiling_of(out_features), can_depend(x.device)
        narrow_kernel[(triton.cdiv(out_features, tiling.columns),)](
            x,
            weight,
            bias,
            residual,
            out,
            num_rows,
            out_features,
            depth,
            COLUMNS=tiling.columns,
            LANES=tiling.lanes,
            ROWS=padded_rows(num_rows),
            IS_EVEN=depth % (tiling.lanes * 64) == 0,
            DEPENDENT=is_dependent,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
            launch_pdl=is_dependent,
        )
    return out


@triton.jit
def prefetch_lines(weight_ptr, line_C, first, in_features, PIECES: tl.constexpr, DEPENDENT: tl.constexpr):
    """PIECES (a power of two) times 64 inputs of some lines of a matrix, from `first` on, into L2: 64 half-width ones are 128 bytes."""
    if DEPENDENT:
        piece = tl.minimum(first + tl.arange(0, PIECES) * 64, in_features - 1)
        prefetch(weight_ptr + line_C.to(tl.int64)[:, None] * in_features + piece[None, :], DEPENDENT)


@triton.jit
def lane_sum(
    x_ptr, weight_ptr, line_C, num_rows, in_features, LANES: tl.constexpr, ROWS: tl.constexpr, IS_EVEN: tl.constexpr
):  # fmt: skip
    """float32 [C, M]: lines of the matrix (valid ones) by the rows of x. IS_EVEN: the depth is a multiple of what the lanes take."""
    DEPTH: tl.constexpr = 64  # 128 bytes of half-width numbers
    row = tl.arange(0, ROWS)
    input_LD = tl.arange(0, LANES)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    is_row = (row < num_rows)[None, :, None]
    weight_at = weight_ptr + line_C.to(tl.int64)[None, :, None] * in_features + input_LD[:, None, :]
    x_at = x_ptr + row[None, :, None] * in_features + input_LD[:, None, :]
    total = tl.zeros([LANES, line_C.shape[0], ROWS], dtype=tl.float32)
    for start in range(0, in_features, LANES * DEPTH):
        if IS_EVEN:
            weight = tl.load(weight_at + start)
            x = tl.load(x_at + start, mask=is_row, other=0.0)
        else:
            inside = (start + input_LD < in_features)[:, None, :]
            weight = tl.load(weight_at + start, mask=inside, other=0.0)
            x = tl.load(x_at + start, mask=is_row & inside, other=0.0)
        total = tl.dot(weight, tl.trans(x, 0, 2, 1), total, input_precision="ieee")
    return tl.sum(total, 0)


@triton.jit
def normed_lane_sum(
    x_ptr, residual_ptr, norm_ptr, total_ptr, weight_ptr, line_C, num_rows, is_writer, eps, in_features,
    LANES: tl.constexpr, ROWS: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    """float32 [C, M]: lines of the matrix by the RMSNorm of the rows of x + residual, in one pass.

    The inverse root mean square is a factor of the whole sum, so it is applied behind it. residual_ptr and total_ptr may be None, both
    or neither; the writer alone puts x + residual, rounded, into total: no program may write what others still read.
    """
    DEPTH: tl.constexpr = 64  # 128 bytes of half-width numbers
    row = tl.arange(0, ROWS)
    input_LD = tl.arange(0, LANES)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    is_row = (row < num_rows)[None, :, None]
    weight_at = weight_ptr + line_C.to(tl.int64)[None, :, None] * in_features + input_LD[:, None, :]
    place = row[None, :, None] * in_features + input_LD[:, None, :]
    total = tl.zeros([LANES, line_C.shape[0], ROWS], dtype=tl.float32)
    squares = tl.zeros([LANES, ROWS, DEPTH], dtype=tl.float32)
    for start in range(0, in_features, LANES * DEPTH):
        inside = (start + input_LD < in_features)[:, None, :]
        readable = is_row & inside
        if IS_EVEN:
            weight = tl.load(weight_at + start)
        else:
            weight = tl.load(weight_at + start, mask=inside, other=0.0)
        x = tl.load(x_ptr + (place + start), mask=readable, other=0.0)
        norm = tl.load(norm_ptr + start + input_LD, mask=start + input_LD < in_features, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + (place + start), mask=readable, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
            tl.store(total_ptr + (place + start), x, mask=readable & is_writer)
        wide = x.to(tl.float32)
        squares += wide * wide
        scaled = (wide * norm[:, None, :]).to(weight.dtype)
        total = tl.dot(weight, tl.trans(scaled, 0, 2, 1), total, input_precision="ieee")
    inverse = tl.rsqrt(tl.sum(tl.sum(squares, 2), 0) / in_features + eps)
    return tl.sum(total, 0) * inverse[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def narrow_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, num_rows,
    out_features, in_features,
    COLUMNS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, IS_EVEN: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Some columns of x by the matrix, plus bias and residual. bias_ptr and residual_ptr may be None; residual_ptr may be out_ptr.

    The matrix's sides are no constants, so that its kernel is compiled once for many of them.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    line = tl.minimum(column, out_features - 1)
    prefetch_lines(weight_ptr, line, 0, in_features, 4 * LANES, DEPENDENT)
    begin(DEPENDENT)
    y = tl.trans(lane_sum(x_ptr, weight_ptr, line, num_rows, in_features, LANES, ROWS, IS_EVEN))
    row = tl.arange(0, ROWS)
    written = (row < num_rows)[:, None] & (column < out_features)[None, :]
    place = row[:, None] * out_features + column[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + line).to(tl.float32)[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + place, mask=written, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=written)
