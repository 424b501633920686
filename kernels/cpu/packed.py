"""Quantised weights in the form that the compiled kernels read, and in the one that plain PyTorch multiplies fastest.

No kernel is called here. Called by `kernels.cpu.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.library import Matrix
from kernels.experts import reference as plain_experts
from kernels.linear.reference import EXACT_COLUMNS, quantize_rows
from kernels.ops import GROUP, GroupedWeight, Int8Weight, Weight

STRIP = 16
"""Outputs side by side: one 64-byte line holds 4 inputs of each."""


@dataclass(frozen=True, eq=False, slots=True)
class PackedStrips:
    """What `Matrix` in braid_cpu.h describes. matrix points into the tensors."""

    tensors: tuple[Tensor, ...]
    matrix: Matrix


def strips_of(tensors: tuple[Tensor, ...], out_features: int, in_features: int, group_bits: int = 0) -> PackedStrips:
    """The struct over tensors that were packed: (data, scales, sums) of `pack_strips`, or (data,) of `pack_groups`."""
    pointers = [tensor.data_ptr() for tensor in tensors] + [None] * (3 - len(tensors))
    return PackedStrips(tensors, Matrix(*pointers, out_features, in_features, group_bits))


def pack_strips(weight: Int8Weight) -> Int8Weight:
    """The weight as strips; `values` becomes an empty tensor, because the strips hold the same numbers."""
    values = F.pad(weight.values, (0, -weight.in_features % 4, 0, -weight.out_features % STRIP)).contiguous()
    quads = values.view(torch.int32).view(-1, STRIP, values.shape[1] // 4)  # four bytes at once: twelve times as fast as one by one
    data = quads.transpose(1, 2).contiguous().view(torch.int8)  # [strips, in / 4, 64]
    scales = F.pad(weight.scales, (0, -weight.out_features % STRIP)).contiguous()
    sums = torch.cat([part.sum(1, dtype=torch.int32) for part in torch.split(values, 1024)])
    strips = strips_of((data, scales, sums), weight.out_features, weight.in_features)
    return replace(weight, values=weight.values.new_empty(0), packed=strips)


def pack_groups(weight: GroupedWeight) -> GroupedWeight:
    """The weight as strips of groups; what they hold is left empty."""
    padding = (0, 0, 0, -weight.out_features % STRIP)
    num_groups = weight.in_features // GROUP
    quads = F.pad(weight.values, padding).view(-1, STRIP, num_groups, GROUP // 4, 4)
    quads = quads.permute(0, 2, 3, 1, 4)  # [strips, groups, 8, 16, 4]
    if weight.bits == 4:
        quads = quads[:, :, :4] | quads[:, :, 4:] << 4
    numbers = [F.pad(x, padding).view(-1, STRIP, num_groups).transpose(1, 2) for x in (weight.scales, weight.offsets)]
    data = torch.cat([quads.flatten(2), *(x.contiguous().view(torch.uint8) for x in numbers)], dim=2).contiguous()
    empty = weight.scales.new_empty(0)
    strips = strips_of((data,), weight.out_features, weight.in_features, weight.bits)
    return replace(weight, values=weight.values.new_empty(0), scales=empty, offsets=empty, packed=strips)


def rows_of(weight: Weight, start: int, end: int) -> Weight:
    """Rows start ... end - 1 of a matrix, packed or not, over the same memory. Raises: ValueError for rows that cut through a strip."""
    if not isinstance(weight, Tensor) and (start, end) == (0, weight.out_features):
        return weight
    packed = None if isinstance(weight, Tensor) else weight.packed
    if isinstance(weight, Tensor) or packed is None:
        return plain_experts.rows_of(weight, start, end)
    if isinstance(packed, tuple) and isinstance(weight, Int8Weight):
        parts = tuple(part[start:end] for part in packed)
        return replace(weight, out_features=end - start, values=weight.values[start:end], scales=weight.scales[start:end], packed=parts)
    if not isinstance(packed, PackedStrips) or start % STRIP or end % STRIP:
        raise ValueError(
            f"rows {start} ... {end - 1} of a packed matrix can't be had by themselves; both ends must be multiples of {STRIP}"
        )
    data, *vectors = packed.tensors
    tensors = (data[start // STRIP : end // STRIP], *(vector[start:end] for vector in vectors))
    bits = weight.bits if isinstance(weight, GroupedWeight) else 0
    return replace(weight, out_features=end - start, packed=strips_of(tensors, end - start, weight.in_features, bits))


def pack_floats(weight: Int8Weight) -> Int8Weight:
    """The weight with its whole numbers also as float32, cut into columns that can be summed exactly: for machines without the library."""
    return replace(weight, packed=tuple(part.float() for part in torch.split(weight.values, EXACT_COLUMNS, dim=1)))


def linear_floats(x: Tensor, weight: Int8Weight, parts: tuple[Tensor, ...]) -> Tensor:
    """`kernels.linear.reference.linear` over what `pack_floats` made: the same numbers, without converting the weight every time."""
    values, scales = quantize_rows(x)
    columns = torch.split(values.float(), EXACT_COLUMNS, dim=1)
    product = F.linear(columns[0], parts[0])
    if len(parts) > 1:
        product = torch.stack([F.linear(*pair).double() for pair in zip(columns, parts, strict=True)]).sum(0)
    return (product.to(scales.dtype) * scales[:, None] * weight.scales.to(scales.dtype)).to(x.dtype)
