"""Products by 8-bit floats on the GPU: few rows of x as they are, many rows as 8-bit floats themselves where the chip multiplies such.

The weight stays as the contract has it, [out, in], since both ways and the vendor's product read that. Called by `triton` beside this.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear.split_triton import add_up, arrivals, split_inputs
from kernels.ops import Fp8Weight

log = logging.getLogger("braid.kernels")

COLUMNS, DEPTH, WARPS = 64, 128, 2
"""Outputs (which stand in a tile's rows) and inputs of a tile, and its warps: see `grouped_triton`."""
TILE_ROWS = (8, 16, 32)
MOST_ROWS = 64
"""Of x that the kernel multiplies. Above, products are bounded by arithmetic, of which a chip has twice as much in 8 bits."""
VENDOR_CAPABILITY = (8, 9)
VENDOR_MULTIPLE = 16  # of inputs and outputs, of `torch._scaled_mm`
SCRATCH_NUMBERS = 32 * 2**20
"""Weights that are written out at once, where there is no product of 8-bit floats."""


@dataclass(frozen=True, slots=True)
class PackedFp8:
    """What the kernels need beside the weight itself: see `arrivals`. has_vendor: can `torch._scaled_mm` multiply it?"""

    arrivals: Tensor
    has_vendor: bool


def pack_fp8(weight: Fp8Weight) -> Fp8Weight:
    num_tiles = triton.cdiv(weight.out_features, COLUMNS) * triton.cdiv(MOST_ROWS, TILE_ROWS[-1])
    fits = weight.out_features % VENDOR_MULTIPLE == 0 and weight.in_features % VENDOR_MULTIPLE == 0
    device = weight.values.device
    has_vendor = fits and device.type == "cuda" and vendor_multiplies(device.index or 0)
    return replace(weight, values=weight.values.contiguous(), packed=PackedFp8(arrivals(num_tiles, device), has_vendor))


@cache
def vendor_multiplies(index: int) -> bool:
    """Does `torch._scaled_mm` take a scale for each row of both sides, on this GPU? Tried once, when the first weight is packed, and so
    never while a graph is captured."""
    if torch.cuda.get_device_capability(index) < VENDOR_CAPABILITY:
        return False
    device = torch.device("cuda", index)
    side = torch.ones((32, 32), device=device).to(torch.float8_e4m3fn)
    scales = torch.ones(32, device=device)
    try:
        found = vendor_product(side, scales, side, scales)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        log.info("products of 8-bit floats go through bfloat16 for many rows: %s", str(error)[:200])
        return False
    return bool((found == 32).all())


def vendor_product(values: Tensor, scales: Tensor, weight_values: Tensor, weight_scales: Tensor) -> Tensor:
    """bfloat16 [M, out] of rows of 8-bit floats."""
    product: Tensor = torch._scaled_mm(
        values,
        weight_values.T,
        scale_a=scales[:, None],
        scale_b=weight_scales[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,  # sums of 14 bits instead of 24; what the rows of x lost when they became 8 bits is more
    )
    return product


def linear_fp8(x: Tensor, weight: Fp8Weight) -> Tensor:
    """x [M, in] by the weight's rows, [M, out] in x's dtype, sums in float32.

    Up to MOST_ROWS x is taken as it is, and a row's result depends neither on the other rows nor on their number. Above, rows of bfloat16
    become 8-bit floats by their own scale where the chip and the shape allow it; else the weight is written out for cuBLAS.
    """
    packed = weight.packed if isinstance(weight.packed, PackedFp8) else pack_fp8(weight).packed
    assert isinstance(packed, PackedFp8)
    x = x.contiguous()
    num_rows = x.shape[0]
    if num_rows > MOST_ROWS and packed.has_vendor and x.dtype == torch.bfloat16:
        return vendor_product(*quantize_fp8_rows(x), weight.values, weight.scales)
    if num_rows > MOST_ROWS:
        return _through_dense(x, weight)
    out = torch.empty((num_rows, weight.out_features), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    rows = next((rows for rows in TILE_ROWS if rows >= num_rows), TILE_ROWS[-1])
    num_tiles, num_chunks = triton.cdiv(weight.out_features, COLUMNS), triton.cdiv(weight.in_features, DEPTH)
    split = split_inputs(num_tiles, num_chunks)
    partials = torch.empty((split.count if split.count > 1 else 0, num_rows, weight.out_features), dtype=torch.float32, device=x.device)
    fp8_kernel[(triton.cdiv(num_rows, rows), num_tiles, split.count)](
        x,
        weight.values.view(torch.uint8),
        weight.scales,
        out,
        partials,
        packed.arrivals,
        num_rows,
        OUT=weight.out_features,
        IN=weight.in_features,
        ROWS=rows,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        CHUNKS=split.chunks,
        SPLITS=split.count,
        num_warps=WARPS,
        num_stages=4,
    )
    return out


def _through_dense(x: Tensor, weight: Fp8Weight) -> Tensor:
    at_once = max(1, SCRATCH_NUMBERS // weight.in_features)
    parts = zip(torch.split(weight.values, at_once), torch.split(weight.scales, at_once), strict=True)
    return torch.cat([F.linear(x, (values.float() * scales[:, None]).to(x.dtype)) for values, scales in parts], 1)


IS_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
FOUR_NUMBERS = tl.constexpr(
    "{ .reg .b32 a, b, c, m, z; mov.b32 m, 0x7B807B80; mov.b32 z, 0x80008000;"
    " prmt.b32 a, $2, 0, 0x1404; shr.u32 b, a, 4; and.b32 b, b, 0x07F007F0; lop3.b32 c, a, 0x80008000, b, 0xEA;"
    " fma.rn.bf16x2 $0, c, m, z;"
    " prmt.b32 a, $2, 0, 0x3424; shr.u32 b, a, 4; and.b32 b, b, 0x07F007F0; lop3.b32 c, a, 0x80008000, b, 0xEA;"
    " fma.rn.bf16x2 $1, c, m, z; }"
)
"""Four bytes in a register to four bfloat16 in two, two and two: each byte becomes the high one of a half, its sign stays, the rest goes 4
bits down; times 2 ** 120, and - 0 added, which keeps the sign of zeros."""


@triton.jit
def decoded(bytes, DTYPE: tl.constexpr):
    """The numbers that the bits of float8_e4m3fn stand for, exactly, zeros and subnormal ones too; NaN is none of them.

    Exponent and mantissa are put where float32 or bfloat16 have theirs, which gives the number times 2 ** -120, for their exponent is
    less by 7 and not by 127. So it takes no chip with such floats, and the interpreter has no other way.
    """
    if tl.bfloat16 == DTYPE and not IS_INTERPRETED:
        found = tl.inline_asm_elementwise(FOUR_NUMBERS, "=r,=r,r", [bytes], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        wide = bytes.to(tl.int32)
        bits = ((wide & 0x7F) << 20) | ((wide & 0x80) << 24)
        found = (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(DTYPE)
    return found


@triton.jit(do_not_specialize=["num_rows"])
def fp8_kernel(
    x_ptr, weight_ptr, scales_ptr, out_ptr, partials_ptr, arrivals_ptr, num_rows,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    CHUNKS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One tile of the output over one split of the inputs."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(2)
    is_row, is_column = row < num_rows, column < OUT
    depth = tl.arange(0, DEPTH)
    x_at = x_ptr + row.to(tl.int64)[None, :] * IN + depth[:, None]
    weight_at = weight_ptr + column.to(tl.int64)[:, None] * IN + depth[None, :]
    first = split * CHUNKS
    last = tl.minimum(first + CHUNKS, tl.cdiv(IN, DEPTH))
    total = tl.zeros([COLUMNS, ROWS], dtype=tl.float32)
    for chunk in range(first, last):
        start = chunk * DEPTH
        is_input = start + depth < IN
        weight = tl.load(weight_at + start, mask=is_column[:, None] & is_input[None, :], other=0)
        x = tl.load(x_at + start, mask=is_row[None, :] & is_input[:, None], other=0.0)
        total = tl.dot(decoded(weight, DTYPE), x, total, input_precision="ieee")
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    at = row.to(tl.int64)[None, :] * OUT + column[:, None]
    is_inside = is_row[None, :] & is_column[:, None]
    total, is_last = add_up(total, partials_ptr, arrivals_ptr + tile, at, is_inside, num_rows.to(tl.int64) * OUT, split, SPLITS)
    scale = tl.load(scales_ptr + column, mask=is_column, other=0.0)
    tl.store(out_ptr + at, (total * scale[:, None]).to(DTYPE), mask=is_inside & is_last)


def quantize_fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values float8_e4m3fn [M, in], scales float32 [M]) of rows, as `reference.quantize_rows_fp8` gives them."""
    num_rows, depth = x.shape
    values = torch.empty((num_rows, depth), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(depth)
    quantize_fp8_kernel[(num_rows,)](x, values, scales, IN=depth, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    return values, scales


@triton.jit
def quantize_fp8_kernel(x_ptr, values_ptr, scales_ptr, IN: tl.constexpr, BLOCK: tl.constexpr):
    """One row: scale = absolute maximum / 448 (1 for a row of zeros), values rounded to the nearest, ties to even."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_column = column < IN
    x = tl.load(x_ptr + row * IN + column, mask=is_column, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), 0), 448.0)
    scale = tl.where(scale > 0, scale, 1.0)
    ratio = tl.minimum(tl.maximum(tl.div_rn(x, scale), -448.0), 448.0)
    tl.store(values_ptr + row * IN + column, ratio.to(tl.float8e4nv), mask=is_column)
    tl.store(scales_ptr + row, scale)
