"""Matrix products and embedding rows over dense and quantised weights, and how a matrix is quantised, in plain PyTorch.

No Triton here and no model. Called by `reference_ops`, by back ends without a product of their own, by weight loading and by tests.
Shape suffixes: M rows of x, T tokens, V vocabulary, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import GROUP, Fp8Weight, GroupedWeight, Int8Weight, Weight

_SHARES = ((0.9, 1.0), (1.0, 0.9), (0.9, 0.9), (1.0, 0.8), (0.8, 1.0), (0.8, 0.9), (0.9, 0.8), (0.8, 0.8))
# Of a group's range, below and above, that `quantize_grouped` tries.
_ROWS_AT_ONCE = 1024  # of a matrix that is quantised: what lies between then fits the caches, and needs no new pages
MOST_FP8 = 448.0
"""The largest number of float8_e4m3fn."""
EXACT_COLUMNS = 1024
"""Columns summed at once in float32: 127 * 127 * 1024 < 2 ** 24, so every partial sum is a whole number that float32 holds."""


def quantize_int8(weight: Tensor) -> Int8Weight:
    """A float matrix [out, in] as int8, each output row by its own scale (its absolute maximum / 127; 1 for a row of zeros)."""
    values, scales = zip(*map(quantize_rows, torch.split(weight, _ROWS_AT_ONCE)), strict=True)
    out_features, in_features = weight.shape
    return Int8Weight(out_features, in_features, torch.cat(values), torch.cat(scales).float())


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values int8 [M, in], scales [M], float32 or wider) with x ~ values * scales[:, None], symmetric, ties rounded to even."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scales = wide.abs().amax(-1) / 127
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    values = (wide / scales[:, None]).round_().clamp_(-127, 127)
    return values.to(torch.int8), scales


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [M, in] by the weight's rows, [M, out] in x's dtype.

    int8: both sides are whole numbers, so the sum is exact and a row's result can't depend on the other rows. fp8: the weight is rounded
    to x's dtype, which only its scales' digits can lose by, and multiplied as a dense one.
    """
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    if isinstance(weight, Fp8Weight):
        return F.linear(x, dense_of_fp8(weight).to(x.dtype))
    if isinstance(weight, GroupedWeight):
        return _linear_grouped(x, weight)
    values, scales = quantize_rows(x)
    product = torch.zeros(len(x), weight.out_features, dtype=torch.float64, device=x.device)
    for column in range(0, weight.in_features, EXACT_COLUMNS):
        part = slice(column, column + EXACT_COLUMNS)
        product += values[:, part].float() @ weight.values[:, part].float().T
    return (product.to(scales.dtype) * scales[:, None] * weight.scales.to(scales.dtype)).to(x.dtype)


def _linear_grouped(x: Tensor, weight: GroupedWeight) -> Tensor:
    """Each group's sum is exact; the groups are added in float32, or wider where x is."""
    groups = (-1, weight.in_features // GROUP, GROUP)
    values, scales = quantize_rows(x.reshape(-1, GROUP))
    values, scales = values.view(groups), scales.view(groups[:2])  # [M, G, 32], [M, G]
    sums = torch.einsum("mgi,ogi->mog", values.float(), weight.values.view(groups).float()).to(scales.dtype)
    weight_scales, offsets = weight.scales.to(scales.dtype), weight.offsets.to(scales.dtype)
    shares = sums * weight_scales * scales[:, None] + offsets * (values.sum(-1) * scales)[:, None]
    return shares.sum(-1).to(x.dtype)


def quantize_grouped(weight: Tensor, bits: int) -> GroupedWeight:
    """A float matrix [out, in], in a multiple of 32, as numbers of `bits` bits.

    0 and 2 ** bits - 1 stand for a group's least and largest number, or for what lies somewhat inside of them where the squared error
    is then smaller: with few bits cutting an outlier off can cost less than coarse steps for all others.
    """
    out_features, in_features = weight.shape
    parts = zip(*(_quantize_groups(rows, bits) for rows in torch.split(weight, _ROWS_AT_ONCE)), strict=True)
    return GroupedWeight(out_features, in_features, bits, *map(torch.cat, parts))


def _quantize_groups(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values, scales, offsets) as a `GroupedWeight` has them."""
    out_features, in_features = weight.shape
    groups = weight.float().view(-1, GROUP)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best = _grid(groups, least, most, bits)
    for low, high in _SHARES if bits < 8 else ():
        other = _grid(groups, least * low, most * high, bits)
        is_better = other[0] < best[0]
        best = tuple(torch.where(is_better, new, old) for new, old in zip(other, best, strict=True))
    _, values, scales, offsets = best
    shape = (out_features, in_features // GROUP)
    return values.to(torch.uint8).view(out_features, in_features), scales.half().view(shape), offsets.half().view(shape)


def _grid(groups: Tensor, least: Tensor, most: Tensor, bits: int) -> tuple[Tensor, ...]:
    """(squared error [n, 1], values [n, 32], scales [n, 1], offsets [n, 1]) of groups [n, 32] on a grid from least to most, all float32;
    scales and offsets are numbers that float16 holds."""
    offsets = least.half().float()
    scales = ((most - offsets) / (2**bits - 1)).half().float()
    values = ((groups - offsets) / torch.where(scales > 0, scales, 1)).round_().clamp_(0, 2**bits - 1)
    error = (values * scales + offsets - groups).square().sum(-1, keepdim=True)
    return error, values, scales, offsets


def quantize_fp8(weight: Tensor) -> Fp8Weight:
    """A float matrix [out, in] as 8-bit floats, each output row by its own scale (its absolute maximum / 448; 1 for a row of zeros)."""
    out_features, in_features = weight.shape
    values, scales = zip(*map(quantize_rows_fp8, torch.split(weight, _ROWS_AT_ONCE)), strict=True)
    return Fp8Weight(out_features, in_features, torch.cat(values), torch.cat(scales))


def quantize_rows_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values float8_e4m3fn [M, in], scales float32 [M]) with x ~ values * scales[:, None], ties rounded to even."""
    wide = x.float()
    scales = wide.abs().amax(-1) / MOST_FP8
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (wide / scales[:, None]).clamp_(-MOST_FP8, MOST_FP8).to(torch.float8_e4m3fn), scales


def dense_of_fp8(weight: Fp8Weight) -> Tensor:
    """float32 [out, in]."""
    return weight.values.float() * weight.scales[:, None]


def dense_of(weight: GroupedWeight) -> Tensor:
    """float32 [out, in]."""
    groups = weight.values.view(weight.out_features, -1, GROUP).float()
    return (groups * weight.scales.float()[..., None] + weight.offsets.float()[..., None]).view(weight.out_features, weight.in_features)


def embed(ids_T: Tensor, weight_VD: Weight, dtype: torch.dtype) -> Tensor:
    """The rows of the table at int64 ids, [T, D] in `dtype`. A quantised table must still hold its `values`."""
    if isinstance(weight_VD, Tensor):
        return weight_VD[ids_T].to(dtype)
    if isinstance(weight_VD, GroupedWeight):
        rows = weight_VD.values[ids_T].view(len(ids_T), -1, GROUP).float()
        return (rows * weight_VD.scales[ids_T].float()[..., None] + weight_VD.offsets[ids_T].float()[..., None]).flatten(1).to(dtype)
    return (weight_VD.values[ids_T].float() * weight_VD.scales[ids_T, None]).to(dtype)


def pack(weight: Weight) -> Weight:
    """The weight as it is: plain PyTorch reads the contract's own form."""
    return weight
