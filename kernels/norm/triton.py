"""RMSNorm with the residual addition in front of it, one Triton program per row.

No model here. Called by `triton_ops`.
Shape suffixes: T tokens, D model width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import begin, can_depend


def rms_norm(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed [T, D], residual [T, D]) in x's dtype.

    Mutates: residual, which becomes residual + x and is returned; without one, x itself is returned in its place.
    """
    x_TD = x_TD.contiguous()
    residual = None if residual_TD is None else residual_TD.contiguous()
    normed = torch.empty_like(x_TD)
    num_rows, width = x_TD.shape
    if num_rows:
        block, is_dependent = triton.next_power_of_2(width), can_depend(x_TD.device)
        norm_kernel[(num_rows,)](
            x_TD,
            residual,
            weight_D,
            normed,
            eps,
            D=width,
            BLOCK=block,
            DEPENDENT=is_dependent,
            num_warps=num_warps_of(block),
            launch_pdl=is_dependent,
        )
    return normed, x_TD if residual is None else residual


def num_warps_of(block: int) -> int:
    """About 16 elements a thread."""
    return min(16, max(1, block // 512))


@triton.jit
def norm_kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, eps, D: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    """One row. residual_ptr may be None; the sum is rounded to the row's dtype before the norm, as the next reader will see it."""
    at = tl.program_id(0).to(tl.int64) * D
    column = tl.arange(0, BLOCK)
    is_column = column < D
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    begin(DEPENDENT)
    x = tl.load(x_ptr + at + column, mask=is_column, other=0.0)
    if residual_ptr is not None:
        total = x.to(tl.float32) + tl.load(residual_ptr + at + column, mask=is_column, other=0.0).to(tl.float32)
        x = total.to(x.dtype)
        tl.store(residual_ptr + at + column, x, mask=is_column)
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    tl.store(normed_ptr + at + column, (wide * inverse * weight).to(x.dtype), mask=is_column)
