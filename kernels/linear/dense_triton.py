"""Which kernel multiplies by a dense matrix on the GPU, by the number of rows.

No kernel and no model here. Called by `kernels.linear.triton`. Which variant is compiled follows from the rows: up to 8, 16, 32, 64, more;
so a warm-up with powers of two of rows, up to the most that a step has, meets them all.
Shape suffixes: M rows of x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import narrow_triton, tiled_triton

MAX_TILED_ROWS = 64
"""Above, a matrix product is limited by arithmetic, where cuBLAS is hard to beat."""
HALVES = (torch.float16, torch.bfloat16)


def fastest(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, in] by the rows of weight [out, in], [M, out] in x's dtype: own kernels up to 64 rows of 16-bit numbers, else cuBLAS.

    Which kernel it is follows from M, so a row's last bits may depend on how many others there are.
    """
    if x.dtype not in HALVES or x.dtype != weight.dtype or not weight.is_contiguous() or len(x) > MAX_TILED_ROWS:
        return F.linear(x, weight)
    return narrow_triton.product(x, weight) if len(x) <= narrow_triton.MAX_ROWS else tiled_triton.product(x, weight)


def deterministic(x: Tensor, weight: Tensor) -> Tensor:
    """The same product by one kernel family at every M: a row's result is bit-equal alone and in any crowd."""
    return tiled_triton.product(x, weight.to(x.dtype).contiguous())
