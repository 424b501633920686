"""Products by numbers in groups (4 or 8 bits) on the GPU, and rows of such tables.

x stays as it is. The numbers, whole and so exact in any float dtype, are multiplied on tensor cores; each group's sum is then multiplied by
its scale in float32, and offsets by the sums of x. So no weight is rounded. Called by `triton` beside this.
Shape suffixes: M rows of x, N outputs, C chunks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear.split_triton import add_up, arrivals, split_inputs
from kernels.ops import GROUP, GroupedWeight

COLUMNS, WARPS = 64, 2
"""Outputs of a tile, which stand in its rows, so that the two numbers of a scale serve eight or more rows of x. Less than four warps:
with four Triton takes Hopper's wgmma, which has to be waited for after every group; so it is the older instruction, whose inputs are
registers, on every chip, and a row's sums come out the same whatever the tile's size."""
TILE_ROWS = (8, 16, 32)
"""Rows of x in a tile: the least that holds them, or many of the last. A weight of 4 bits takes 3.0, 3.8 and 5.4 instructions (counted in
the loop for sm_90); an H200 has time for about 3.5 while it reads the next one."""
MOST_ROWS = 128
"""Of x that the kernel multiplies. Above, unpacking anew for every 32 rows costs more than writing the weight out once for cuBLAS: at
4,096 x 14,336 and 256 rows about 90 us against 75 on an H200 (reckoned from the instructions and the bytes, not measured)."""
SCRATCH_NUMBERS = 128 * 2**20
"""Weights that are written out at once."""


@dataclass(frozen=True, slots=True)
class PackedGroups:
    """words int16 [C, N, 32]: word j of a chunk holds, from its low bits on, the numbers of input j of each of the chunk's 16 / bits
    groups; the inputs are filled up to whole chunks with zeros. grids int32 [groups, N]: scale (low half) and offset as float16."""

    words: Tensor
    grids: Tensor
    arrivals: Tensor


def pack_groups(weight: GroupedWeight) -> GroupedWeight:
    """The same numbers as the kernels read them; those of the contract are dropped."""
    per_word = 16 // weight.bits
    num_chunks = -(-weight.in_features // (GROUP * per_word))
    missing = num_chunks * GROUP * per_word - weight.in_features
    values = F.pad(weight.values, (0, missing)).view(weight.out_features, num_chunks, per_word, GROUP)
    words = torch.zeros((num_chunks, weight.out_features, GROUP), dtype=torch.int32, device=values.device)
    for index in range(per_word):
        words |= values[:, :, index].transpose(0, 1).to(torch.int32) << (weight.bits * index)
    grids = torch.stack((weight.scales, weight.offsets), -1).view(torch.int32)[..., 0]
    grids = F.pad(grids, (0, missing // GROUP)).T.contiguous()
    num_tiles = triton.cdiv(weight.out_features, COLUMNS) * triton.cdiv(MOST_ROWS, TILE_ROWS[-1])
    packed = PackedGroups(words.to(torch.int16), grids, arrivals(num_tiles, values.device))
    empty = values.new_empty(0)
    return replace(weight, values=empty, scales=empty.half(), offsets=empty.half(), packed=packed)


def linear_grouped(x: Tensor, weight: GroupedWeight) -> Tensor:
    """x [M, in] by the weight's rows, [M, out] in x's dtype, sums in float32.

    Up to MOST_ROWS a row's result depends neither on the other rows nor on their number; above it is what cuBLAS makes of it.
    """
    packed = weight.packed if isinstance(weight.packed, PackedGroups) else pack_groups(weight).packed
    assert isinstance(packed, PackedGroups)
    x = x.contiguous()
    num_rows = x.shape[0]
    if num_rows > MOST_ROWS:
        return _through_dense(x, weight, packed)
    out = torch.empty((num_rows, weight.out_features), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    rows = next((rows for rows in TILE_ROWS if rows >= num_rows), TILE_ROWS[-1])
    num_tiles = triton.cdiv(weight.out_features, COLUMNS)
    split = split_inputs(num_tiles, packed.words.shape[0])
    partials = torch.empty((split.count if split.count > 1 else 0, num_rows, weight.out_features), dtype=torch.float32, device=x.device)
    grouped_kernel[(triton.cdiv(num_rows, rows), num_tiles, split.count)](
        x,
        packed.words,
        packed.grids,
        out,
        partials,
        packed.arrivals,
        num_rows,
        OUT=weight.out_features,
        IN=weight.in_features,
        BITS=weight.bits,
        ROWS=rows,
        COLUMNS=COLUMNS,
        CHUNKS=split.chunks,
        SPLITS=split.count,
        NUM_CHUNKS=packed.words.shape[0],
        STAGES=4,
        num_warps=WARPS,
    )
    return out


IS_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
PAIRS_OF_4_BITS = tl.constexpr(
    tuple(
        f"{{ .reg .b32 t; {shift}; lop3.b32 $0, t, 0x00780078, 0x41804180, 0xEA; }}"
        for shift in ("shl.b32 t, $1, 3", "shr.u32 t, $1, 1", "shr.u32 t, $1, 5", "shr.u32 t, $1, 9")
    )
)
"""Two words in a register to two bfloat16 in a register: what `numbers` says, for both at once. (t & mask) | 16."""
PAIRS_OF_8_BITS = tl.constexpr(
    tuple(
        f"{{ .reg .b32 a, b; prmt.b32 a, $1, 0x4B000000, 0x744{low}; prmt.b32 b, $1, 0x4B000000, 0x744{high};"
        " add.rn.f32 a, a, 0fCB000000; add.rn.f32 b, b, 0fCB000000; cvt.rn.bf16x2.f32 $0, b, a; }"
        for low, high in ((0, 2), (1, 3))
    )
)
"""The same for 8 bits: below the exponent of 2 ** 23 a byte is 2 ** 23 + number in float32."""


@triton.jit
def numbers(words, index: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The numbers at one place of all words as DTYPE; those of 4 bits come with 16 added, but in float32. Exact.

    As the highest bits of a mantissa below the exponent of 16, four bits are 16 + number without any conversion.
    """
    if tl.bfloat16 == DTYPE and not IS_INTERPRETED:
        asm: tl.constexpr = PAIRS_OF_4_BITS[index] if BITS == 4 else PAIRS_OF_8_BITS[index]
        found = tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    elif BITS == 8:
        found = ((words >> (8 * index)) & 255).to(tl.float32).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        bits = words << 3 if index == 0 else words >> (4 * index - 3)
        found = ((bits & 0x78) | 0x4180).to(tl.bfloat16, bitcast=True)
    elif tl.float16 == DTYPE:
        bits = words << (6 - 4 * index) if index < 2 else words >> (4 * index - 6)
        found = ((bits & 0x3C0) | 0x4C00).to(tl.float16, bitcast=True)
    else:
        found = ((words >> (4 * index)) & 15).to(tl.float32)
    return found


@triton.jit
def scale_of(grid):
    return (grid & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def offset_of(grid):
    return (grid >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def grouped_kernel(
    x_ptr, words_ptr, grids_ptr, out_ptr, partials_ptr, arrivals_ptr, num_rows,
    OUT: tl.constexpr, IN: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr, SPLITS: tl.constexpr, NUM_CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of the output over one split of the inputs."""
    GROUP: tl.constexpr = 32
    PER_WORD: tl.constexpr = 16 // BITS
    SPAN: tl.constexpr = GROUP * PER_WORD
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    BIAS: tl.constexpr = 16 if BITS == 4 and tl.float32 != DTYPE else 0
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(2)
    is_row, is_column = row < num_rows, column < OUT
    depth = tl.arange(0, GROUP)
    first = split * CHUNKS
    last = tl.minimum(first + CHUNKS, NUM_CHUNKS)
    x_at = x_ptr + row.to(tl.int64)[None, :] * IN + depth[:, None]
    words_at = words_ptr + first.to(tl.int64) * OUT * GROUP + column[:, None] * GROUP + depth[None, :]
    grids_at = grids_ptr + first.to(tl.int64) * PER_WORD * OUT + column
    ones = tl.full([COLUMNS, GROUP], 1.0, dtype=tl.float32).to(DTYPE)
    total = tl.zeros([COLUMNS, ROWS], dtype=tl.float32)
    for chunk in tl.range(first, last, num_stages=STAGES):
        words = tl.load(words_at, mask=is_column[:, None], other=0)
        for index in tl.static_range(PER_WORD):
            start = chunk * SPAN + index * GROUP
            is_input = is_row[None, :] if IN % SPAN == 0 else is_row[None, :] & (start < IN)
            x = tl.load(x_at + start, mask=is_input, other=0.0)
            grid = tl.load(grids_at, mask=is_column, other=0)
            product = tl.dot(numbers(words, index, BITS, DTYPE), x, input_precision="ieee")
            sums = tl.dot(ones, x, input_precision="ieee")  # each row of it: laid out as the product is, and next to free
            scale = scale_of(grid)
            total = tl.fma(product, tl.broadcast_to(scale[:, None], total.shape), total)
            total = tl.fma(sums, tl.broadcast_to((offset_of(grid) - BIAS * scale)[:, None], total.shape), total)
            grids_at += OUT
        words_at += OUT * GROUP
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    at = row.to(tl.int64)[None, :] * OUT + column[:, None]
    is_inside = is_row[None, :] & is_column[:, None]
    total, is_last = add_up(total, partials_ptr, arrivals_ptr + tile, at, is_inside, num_rows.to(tl.int64) * OUT, split, SPLITS)
    tl.store(out_ptr + at, total.to(DTYPE), mask=is_inside & is_last)


def _through_dense(x: Tensor, weight: GroupedWeight, packed: PackedGroups) -> Tensor:
    """Writes the weight out in x's dtype, so many rows at a time, and multiplies as if it were dense."""
    at_once = max(1, SCRATCH_NUMBERS // weight.in_features)
    if at_once >= weight.out_features:
        return F.linear(x, _dense(weight, packed, 0, weight.out_features, x.dtype))
    starts = range(0, weight.out_features, at_once)
    return torch.cat([F.linear(x, _dense(weight, packed, n, min(n + at_once, weight.out_features), x.dtype)) for n in starts], 1)


def _dense(weight: GroupedWeight, packed: PackedGroups, start: int, end: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty((end - start, weight.in_features), dtype=dtype, device=packed.words.device)
    _rows(out, None, packed, weight, start)
    return out


def embed_grouped(ids_T: Tensor, weight: GroupedWeight, dtype: torch.dtype) -> Tensor:
    """[T, in]: the rows at int64 ids of a weight that `pack_groups` has packed."""
    assert isinstance(weight.packed, PackedGroups)
    out = torch.empty((len(ids_T), weight.in_features), dtype=dtype, device=ids_T.device)
    if len(ids_T):
        _rows(out, ids_T, weight.packed, weight, 0)
    return out


def _rows(out: Tensor, ids_T: Tensor | None, packed: PackedGroups, weight: GroupedWeight, start: int) -> None:
    block = 16
    grid = (packed.words.shape[0], triton.cdiv(out.shape[0], block))  # what is written, the larger side, lies one behind the other
    rows_kernel[grid](
        ids_T, packed.words, packed.grids, out, start, out.shape[0],
        OUT=weight.out_features, IN=weight.in_features, BITS=weight.bits, ROWS=block, num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["start", "num_rows"])
def rows_kernel(
    ids_ptr, words_ptr, grids_ptr, out_ptr, start, num_rows,
    OUT: tl.constexpr, IN: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One chunk of ROWS rows, dense: those at the ids, or from `start` on where ids_ptr is None."""
    GROUP: tl.constexpr = 32
    PER_WORD: tl.constexpr = 16 // BITS
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(0).to(tl.int64)
    is_row = place < num_rows
    row = place.to(tl.int64) + start
    if ids_ptr is not None:
        row = tl.load(ids_ptr + place, mask=is_row, other=0)
    depth = tl.arange(0, GROUP)
    words = tl.load(words_ptr + (chunk * OUT + row)[:, None] * GROUP + depth[None, :], mask=is_row[:, None], other=0)
    for index in tl.static_range(PER_WORD):
        grid = tl.load(grids_ptr + (chunk * PER_WORD + index) * OUT + row, mask=is_row, other=0)
        value = ((words >> (BITS * index)) & (2**BITS - 1)).to(tl.float32)
        # Offset and product are each rounded once, as plain PyTorch rounds them.
        y = value * scale_of(grid)[:, None] + offset_of(grid)[:, None]
        first = chunk * GROUP * PER_WORD + index * GROUP
        at = out_ptr + place.to(tl.int64)[:, None] * IN + (first + depth)[None, :]
        tl.store(at, y.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & (first < IN))
