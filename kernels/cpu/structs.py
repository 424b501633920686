"""Tensors and specs as the structs that the compiled kernels take: pointers, strides and sizes.

No call into the library and no arithmetic here. A struct points into tensors that whoever holds it must keep. Called by `ops` alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import KV, Batch, Draw, Layer, Matrix, Spec
from kernels.cpu.packed import PackedStrips
from kernels.ops import AttentionSpec, LayerWeights, PagedBatch, PagedKV, SampleRows, Weight

_UNSEEN = 2**63 - 1


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def strips_of(weight: Weight) -> PackedStrips | None:
    return weight.packed if not isinstance(weight, Tensor) and isinstance(weight.packed, PackedStrips) else None


def tensors_of(batch: PagedBatch) -> tuple[Tensor | None, ...]:
    return (batch.slots, batch.block_table, batch.query_start, batch.context_len, batch.grid_start)


def key_of(tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    """Identities, which stay theirs as long as whoever uses them for a key keeps the tensors."""
    return tuple(map(id, tensors))


class DrawRows:
    """The struct of a call's parameters, and the tensors that it points into."""

    def __init__(self, rows: SampleRows, mask: Tensor | None) -> None:
        floats = [x.float().contiguous() for x in (rows.temperature, rows.top_p, rows.min_p)]
        ints = [rows.top_k.int().contiguous(), rows.seeds.contiguous(), rows.positions.contiguous()]
        self.mask = None if mask is None else mask.int().contiguous()
        self.tensors = floats + ints
        self.struct = Draw(*(x.data_ptr() for x in self.tensors), pointer(self.mask))


def layer_struct(weights: LayerWeights, matrices: list[Matrix]) -> Layer:
    spec = weights.spec
    vectors = (
        weights.attention_norm,
        weights.mlp_norm,
        weights.qkv_bias,
        weights.q_norm,
        weights.k_norm,
        weights.rotary,
        weights.out_norm,
        weights.down_norm,
    )
    for vector in vectors:
        if vector is not None and not vector.is_contiguous():
            raise ValueError("norms, biases and the rotary table must be contiguous")
    numbers = (
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_width,
        len(weights.attention_norm),
        spec.activation == "gelu_tanh",
        spec.norm_eps,
    )
    return Layer(*matrices, *map(pointer, vectors), *numbers)


def spec_struct(spec: AttentionSpec) -> Spec:
    near = spec.neighbourhood
    radii = (0, 0, 0) if near is None else (near.columns, near.row_radius, near.column_radius)
    return Spec(spec.scale, spec.softcap, _UNSEEN if spec.window is None else spec.window, spec.sink, *radii)


def pool_struct(kv: PagedKV) -> KV | None:
    _, num_kv_heads, block_size, width = kv.keys.shape
    scales = kv.key_scales
    if kv.keys.dtype not in (torch.bfloat16, torch.float32, torch.int8) or (kv.keys.dtype is torch.int8) == (scales is None):
        return None
    if 1 not in kv.keys.stride()[2:] or kv.values.stride(3) != 1 or (scales is not None and scales.stride(2) != 1):
        return None
    strides = (*kv.keys.stride()[:3], *kv.values.stride()[:3], *((0, 0) if scales is None else scales.stride()[:2]))
    numbers = (block_size, num_kv_heads, width, 8 * kv.keys.itemsize, kv.keys.stride(3))
    return KV(kv.keys.data_ptr(), kv.values.data_ptr(), pointer(scales), pointer(kv.value_scales), *strides, *numbers)


def batch_struct(batch: PagedBatch) -> Batch:
    """A struct that points into the batch's tensors. Raises: ValueError for a dtype or stride that the kernels can't read."""
    given = (batch.slots, batch.block_table, batch.query_start, batch.context_len, batch.grid_start)
    kinds = (torch.int64, torch.int32, torch.int32, torch.int32, torch.int32)
    if any(x is not None and (x.dtype is not kind or not x.is_contiguous()) for x, kind in zip(given, kinds, strict=True)):
        raise ValueError("slots must be int64, block_table, query_start, context_len and grid_start int32, and all contiguous")
    slots, table, query_start, context_len, grid_start = map(pointer, given)
    return Batch(slots, table, batch.block_table.shape[1], query_start, context_len, len(batch.context_len), grid_start)
