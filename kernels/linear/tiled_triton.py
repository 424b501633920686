"""Products of any number of rows by a dense matrix on the GPU, with one order of summation a matrix: a row's bits never depend on others.

No model here. Called by `dense_triton`: for 17 to 64 rows always, for all numbers of rows where the server is deterministic.
The depth is cut into chunks whose width follows from the matrix's shape alone. A chunk is summed from its first input to its last, chunks
are added from first to last. Whether one program takes all of them or each has its own (added by a second kernel) is free, as are tiles.
The matrix is the left side of the tensor operation (64 lines and four warps at least), so that few rows and many use the same instruction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import begin, can_depend
from kernels.linear.narrow_triton import prefetch_lines

PROGRAMS = 264
"""What a product is split for: two programs on each of 132 multiprocessors. Part of the order of summation, so the same on every chip."""
MIN_CHUNK = 512
BUSY = 132
"""Tiles from which on a program takes all chunks of its tile. Changes no result."""
LINES = 64
MERGED = 1024


@dataclass(frozen=True, slots=True)
class Tiling:
    lines: int
    rows: int
    num_warps: int
    num_stages: int


def chunk_of(out_features: int, in_features: int) -> int:
    """Inputs of a chunk, a multiple of 64: from the shape alone, so many that 64 lines a program make about PROGRAMS."""
    wanted = max(1, PROGRAMS // triton.cdiv(out_features, LINES))
    num_chunks = max(1, min(wanted, in_features // MIN_CHUNK))
    return int(triton.cdiv(triton.cdiv(in_features, num_chunks), 64)) * 64


def tiling_of(num_rows: int, dtype: torch.dtype) -> Tiling:
    """Tiles by rows. float32 has no tensor operation that keeps its precision and gets small ones."""
    if dtype == torch.float32:
        return Tiling(LINES, 16 if num_rows <= 16 else 32, 4, 2)
    for rows, num_stages in ((16, 5), (32, 5), (64, 4)):
        if num_rows <= rows:
            return Tiling(LINES, rows, 4, num_stages)
    return Tiling(128, 128, 8, 4)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, in] by the rows of weight [out, in]: [M, out] in x's dtype. Bit-equal for a row whatever M and the other rows are."""
    x = x.contiguous()
    num_rows, depth = x.shape
    out_features = weight.shape[0]
    out = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    tiling, chunk = tiling_of(num_rows, x.dtype), chunk_of(out_features, depth)
    num_chunks, is_dependent = triton.cdiv(depth, chunk), can_depend(x.device)
    tiles = (triton.cdiv(num_rows, tiling.rows), triton.cdiv(out_features, tiling.lines))
    is_split = num_chunks > 1 and tiles[0] * tiles[1] < BUSY
    target = torch.empty((num_chunks, num_rows, out_features), dtype=torch.float32, device=x.device) if is_split else out
    tiled_kernel[(*tiles, num_chunks if is_split else 1)](
        x,
        weight,
        target,
        num_rows,
        out_features,
        depth,
        chunk,
        1 if is_split else num_chunks,
        LINES=tiling.lines,
        ROWS=tiling.rows,
        DEPTH=32 if x.dtype == torch.float32 else 64,
        IS_EVEN=depth % 64 == 0,
        DEPENDENT=is_dependent,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        launch_pdl=is_dependent,
    )
    if is_split:
        merge_kernel[(triton.cdiv(out.numel(), MERGED),)](
            target, out, out.numel(), CHUNKS=num_chunks, BLOCK=MERGED, DEPENDENT=is_dependent, num_warps=4, launch_pdl=is_dependent
        )
    return out


@triton.jit(do_not_specialize=["num_rows", "num_chunks"])
def tiled_kernel(
    x_ptr, weight_ptr, out_ptr, num_rows, out_features, in_features, chunk_len, num_chunks,
    LINES: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, IS_EVEN: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One tile of the output over num_chunks chunks, the first of which is program_id(2)'s. out is [program_id(2), num_rows, out_features].

    The matrix's sides are no constants, so that its kernel is compiled once for many of them.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = tl.program_id(1) * LINES + tl.arange(0, LINES)
    first = tl.program_id(2) * chunk_len
    is_row = row < num_rows
    readable = tl.minimum(line, out_features - 1)
    prefetch_lines(weight_ptr, readable, first, in_features, 4, DEPENDENT)
    begin(DEPENDENT)
    depth = tl.arange(0, DEPTH)
    weight_at = weight_ptr + readable.to(tl.int64)[:, None] * in_features + depth[None, :]
    x_at = x_ptr + row.to(tl.int64)[:, None] * in_features + depth[None, :]
    total = tl.zeros([LINES, ROWS], dtype=tl.float32)
    for chunk in range(num_chunks):
        begins = first + chunk * chunk_len
        ends = tl.minimum(begins + chunk_len, in_features)
        part = tl.zeros([LINES, ROWS], dtype=tl.float32)
        for start in range(begins, ends, DEPTH):
            if IS_EVEN:
                weight = tl.load(weight_at + start)
                x = tl.load(x_at + start, mask=is_row[:, None], other=0.0)
            else:
                inside = (start + depth < in_features)[None, :]
                weight = tl.load(weight_at + start, mask=inside, other=0.0)
                x = tl.load(x_at + start, mask=is_row[:, None] & inside, other=0.0)
            part = tl.dot(weight, tl.trans(x), part, input_precision="ieee")
        total += part
    at = out_ptr + (tl.program_id(2).to(tl.int64) * num_rows + row.to(tl.int64))[None, :] * out_features + line[:, None]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=is_row[None, :] & (line < out_features)[:, None])


@triton.jit(do_not_specialize=["size"])
def merge_kernel(parts_ptr, out_ptr, size, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """out = the chunks' sums, added from first to last as one program would."""
    begin(DEPENDENT)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_place = place < size
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for chunk in range(CHUNKS):
        total += tl.load(parts_ptr + chunk * size.to(tl.int64) + place, mask=is_place, other=0.0)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=is_place)
