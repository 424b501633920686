"""Matrix products and embedding rows over dense and int8 weights, and how a matrix becomes int8, in plain PyTorch.

No Triton here and no model. Called by `reference_ops`, by back ends without a product of their own, by weight loading and by tests.
Shape suffixes: M rows of x, T tokens, V vocabulary, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import Int8Weight, Weight

EXACT_COLUMNS = 1024
"""Columns summed at once in float32: 127 * 127 * 1024 < 2 ** 24, so every partial sum is a whole number that float32 holds."""


def quantize_int8(weight: Tensor) -> Int8Weight:
    """A float matrix [out, in] as int8, each output row by its own scale (its absolute maximum / 127; 1 for a row of zeros)."""
    values, scales = quantize_rows(weight)
    out_features, in_features = weight.shape
    return Int8Weight(out_features, in_features, values, scales.float())


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values int8 [M, in], scales [M], float32 or wider) with x ~ values * scales[:, None], symmetric, ties rounded to even."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scales = wide.abs().amax(-1) / 127
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    values = torch.round(wide / scales[:, None]).clamp(-127, 127)
    return values.to(torch.int8), scales


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [M, in] by the weight's rows, [M, out] in x's dtype.

    int8: both sides are whole numbers, so the sum is exact and a row's result can't depend on the other rows.
    """
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    values, scales = quantize_rows(x)
    product = torch.zeros(len(x), weight.out_features, dtype=torch.float64, device=x.device)
    for column in range(0, weight.in_features, EXACT_COLUMNS):
        part = slice(column, column + EXACT_COLUMNS)
        product += values[:, part].float() @ weight.values[:, part].float().T
    return (product.to(scales.dtype) * scales[:, None] * weight.scales.to(scales.dtype)).to(x.dtype)


def embed(ids_T: Tensor, weight_VD: Weight, dtype: torch.dtype) -> Tensor:
    """The rows of the table at int64 ids, [T, D] in `dtype`. An int8 table must still hold its `values`."""
    if isinstance(weight_VD, Tensor):
        return weight_VD[ids_T].to(dtype)
    return (weight_VD.values[ids_T].float() * weight_VD.scales[ids_T, None]).to(dtype)


def pack(weight: Weight) -> Weight:
    """The weight as it is: plain PyTorch reads the contract's own form."""
    return weight
