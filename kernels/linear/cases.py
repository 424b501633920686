"""Named inputs of products as data, and how to build their tensors: by int8 matrices, by dense ones, a layer of fused ones, by numbers in
groups and by 8-bit floats.

No expectations here. Called by `tests/kernels` and `bench/kernels`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.linear.reference import quantize_fp8, quantize_grouped, quantize_int8
from kernels.ops import (
    Activation,
    AttentionSpec,
    Fp8Weight,
    GroupedWeight,
    Int8Weight,
    LayerSpec,
    LayerWeights,
    PagedBatch,
    PagedKV,
)


@dataclass(frozen=True, slots=True)
class LinearCase:
    """A product [num_rows, in_features] by [out_features, in_features]; zero_row: make the first row of x zeros."""

    name: str
    why: str
    num_rows: int
    in_features: int
    out_features: int
    zero_row: bool = False
    size: Literal["tiny", "small", "bench"] = "tiny"


CASES = (
    LinearCase("decode", "one row in a tile of sixteen", 1, 128, 64),
    LinearCase("ragged", "no side is a multiple of its tile", 5, 200, 70),
    LinearCase("zeros", "a row of zeros has no scale of its own", 3, 64, 64, zero_row=True),
    LinearCase("tall", "more rows than the small tile holds", 40, 96, 48),
    LinearCase("deep", "sums past 2 ** 24, which float32 would round", 2, 4096, 32),
    LinearCase("bench_decode", "the widest product of a small model", 8, 576, 3072, size="bench"),
    LinearCase("bench_head", "the head of a small model", 64, 576, 49152, size="bench"),
    LinearCase("bench_prefill", "a token budget through a large model", 2048, 4096, 14336, size="bench"),
)


def build(case: LinearCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Tensor, Int8Weight]:
    """(x [M, in], weight) of a case. The deep case is all one sign, so that its sums are as large as they can be."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((case.num_rows, case.in_features), generator=generator)
    dense = torch.randn((case.out_features, case.in_features), generator=generator)
    if case.in_features > 2048:
        x, dense = 3 + x.abs() / 8, 3 + dense.abs() / 8
    if case.zero_row:
        x[0] = 0
    return x.to(device, dtype), quantize_int8(dense.to(device))


@dataclass(frozen=True, slots=True)
class DenseCase:
    """A product of num_rows by a dense matrix [out_features, in_features]."""

    name: str
    why: str
    num_rows: int
    in_features: int
    out_features: int
    size: Literal["tiny", "small", "huge", "bench"] = "tiny"


DENSE_CASES = (
    DenseCase("one_row", "a decode of one sequence: seven rows of eight are empty", 1, 128, 64),
    DenseCase("one_stretch", "less depth than the lanes take at once", 3, 64, 48),
    DenseCase("ragged", "no side is a multiple of its tile", 5, 200, 70),
    DenseCase("sixteen", "the most rows that are limited by reading", 16, 576, 40),
    DenseCase("tiled", "one row more", 17, 200, 70),
    DenseCase("chunks", "a depth of several chunks, the last of them ragged", 33, 1640, 70),
    DenseCase("many_rows", "more rows than a tile has", 150, 136, 136),
    DenseCase("deep", "a feed-forward's way back", 4, 6912, 96, size="small"),
    DenseCase("huge", "an offset past 2 ** 31 into the matrix", 2, 4096, 540_672, size="huge"),
    *(
        DenseCase(f"bench_{model}_{product}_{num_rows}", "a product of a step", num_rows, width, out, size="bench")
        for model, shapes in {
            "llama_8b": {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096)},
            "llama_1b": {"qkv": (3072, 2048), "out": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192), "head": (128256, 2048)},
            "gemma3_1b": {"qkv": (1536, 1152), "out": (1152, 1024), "gate_up": (13824, 1152), "down": (1152, 6912)},
            "qwen3_06b": {"qkv": (4096, 1024), "out": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)},
        }.items()
        for product, (out, width) in shapes.items()
        for num_rows in (1, 8, 16, 64)
    ),
)


def build_dense(case: DenseCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """(x [M, in], weight [out, in]) of a case. Both are made on the device where they are large."""
    where = device if case.size in ("huge", "bench") else "cpu"
    generator = torch.Generator(where).manual_seed(seed)
    x = torch.randn((case.num_rows, case.in_features), generator=generator, device=where).to(device, dtype)
    weight = torch.empty((case.out_features, case.in_features), dtype=dtype if where == device else torch.float32, device=where)
    weight.normal_(generator=generator)
    return x, (weight / math.sqrt(case.in_features)).to(device, dtype)


@dataclass(frozen=True, slots=True)
class LayerCase:
    """A decoder layer over dense matrices, and a step of num_rows tokens.

    has_residual: not the first layer. padded: how many of the tokens at the end have slot -1. has_bias, has_norms: of the q/k/v product
    and of its heads. has_post_norms: behind the products that give D numbers. pool: dtype of keys and values, None for x's.
    """

    name: str
    why: str
    num_rows: int
    width: int = 96
    num_heads: int = 2
    num_kv_heads: int = 1
    head_width: int = 32
    hidden: int = 40
    activation: Activation = "silu"
    has_residual: bool = True
    padded: int = 0
    has_bias: bool = False
    has_norms: bool = False
    has_post_norms: bool = False
    pool: torch.dtype | None = None
    size: Literal["tiny", "small", "bench"] = "tiny"


LAYER_CASES = (
    LayerCase("first", "no residual yet: x itself comes back", 1, has_residual=False),
    LayerCase("decodes", "a batch with a padded row", 5, padded=1),
    LayerCase("sixteen", "every row of the tile", 16, num_heads=1, hidden=72, activation="gelu_tanh"),
    LayerCase("ragged", "a width that is no multiple of the lanes, half a head of 24", 3, 200, head_width=48),
    LayerCase("other_pool", "keys and values are rounded to the pool's own dtype", 2, pool=torch.float16),
    LayerCase("bias", "a bias is added before rotation", 3, has_bias=True),
    LayerCase("norms", "and so do norms of heads", 9, has_norms=True),
    LayerCase("post_norms", "what is added to the residual is normed first", 3, has_norms=True, has_post_norms=True),
    LayerCase("wide", "several rounds of all lanes", 4, 2304, 2, 1, 64, 256, size="small"),
    LayerCase("bench_llama_8b_1", "a layer of a large model, one sequence", 1, 4096, 32, 8, 128, 14336, size="bench"),
    LayerCase("bench_llama_8b_16", "a layer of a large model", 16, 4096, 32, 8, 128, 14336, size="bench"),
    LayerCase("bench_llama_1b_1", "a layer of a small model, one sequence", 1, 2048, 32, 8, 64, 8192, size="bench"),
    LayerCase("bench_qwen3_06b_1", "a layer of a small model with norms of heads", 1, 1024, 16, 8, 128, 3072, has_norms=True, size="bench"),
)


def build_layer(
    case: LayerCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor | None, LayerWeights, Tensor, PagedKV]:
    """(x [T, D], residual [T, D] or None, weights, positions [T], kv) of a case; the pool starts as zeros, keys beside values."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn((rows, columns), generator=generator, device=device) / math.sqrt(columns)).to(dtype)

    width, heads = case.head_width, case.num_heads + 2 * case.num_kv_heads
    angles = torch.rand((64, width // 2), generator=generator, device=device) * 6.3
    weights = LayerWeights(
        spec=LayerSpec(case.num_heads, case.num_kv_heads, width, AttentionSpec(1.0), 1e-5, case.activation),
        attention_norm=1 + normal(case.width) / 4,
        qkv=matrix(heads * width, case.width),
        out=matrix(case.width, case.num_heads * width),
        mlp_norm=1 + normal(case.width) / 4,
        gate_up=matrix(2 * case.hidden, case.width),
        down=matrix(case.width, case.hidden),
        rotary=torch.stack((angles.cos(), angles.sin()), dim=1).float(),
        qkv_bias=normal(heads * width) if case.has_bias else None,
        q_norm=normal(width) if case.has_norms else None,
        k_norm=normal(width) if case.has_norms else None,
        out_norm=normal(case.width) if case.has_post_norms else None,
        down_norm=normal(case.width) if case.has_post_norms else None,
    )
    pool = torch.zeros((4, 2, case.num_kv_heads, 16, width), dtype=case.pool or dtype, device=device)
    slots = torch.randperm(64, generator=generator, device=device)[: case.num_rows]
    slots[case.num_rows - case.padded :] = -1
    positions = torch.randint(64, (case.num_rows,), generator=generator, device=device)
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    batch = PagedBatch(slots, nothing[:0].view(0, 1), nothing, nothing[:0], num_decodes=0, max_query_len=0, max_context_len=0)
    x, residual = normal(case.num_rows, case.width), normal(case.num_rows, case.width)
    return x, residual if case.has_residual else None, weights, positions, PagedKV(pool[:, 0], pool[:, 1], batch)


@dataclass(frozen=True, slots=True)
class FloatCase:
    """A product whose x stays as it is, by numbers in groups (of 4 or 8 bits) or by 8-bit floats. zero_row: as in `LinearCase`; the first
    row of the weight is zeros then too."""

    name: str
    why: str
    kind: Literal["int4", "groups8", "fp8"]
    num_rows: int
    in_features: int
    out_features: int
    zero_row: bool = False
    size: Literal["tiny", "small", "bench"] = "tiny"


FLOAT_CASES = (
    FloatCase("int4_one_group", "less than one chunk of inputs", "int4", 1, 32, 64),
    FloatCase("int4_ragged", "no side is a multiple of its tile", "int4", 5, 288, 70),
    FloatCase("int4_zeros", "a group of equal numbers has no scale", "int4", 3, 128, 40, zero_row=True),
    FloatCase("int4_splits", "inputs in two splits, sixteen rows in a tile", "int4", 12, 1056, 65),
    FloatCase("int4_tiles", "more rows than the largest tile holds", "int4", 40, 160, 48),
    FloatCase("int4_dense", "more rows than the kernel takes", "int4", 130, 96, 40),
    FloatCase("groups8_ragged", "8 bits, half a chunk of inputs is missing", "groups8", 5, 288, 70),
    FloatCase("groups8_splits", "8 bits, inputs in three splits", "groups8", 9, 800, 65),
    FloatCase("groups8_dense", "8 bits, more rows than the kernel takes", "groups8", 130, 64, 40),
    FloatCase("fp8_ragged", "no side is a multiple of its tile", "fp8", 5, 200, 70),
    FloatCase("fp8_zeros", "a row of zeros has no scale of its own", "fp8", 3, 64, 64, zero_row=True),
    FloatCase("fp8_splits", "inputs in two splits, sixteen rows in a tile", "fp8", 12, 1100, 65),
    FloatCase("fp8_tiles", "more rows than the largest tile holds", "fp8", 40, 96, 48),
    FloatCase("fp8_dense", "more rows than the kernel takes, in a shape that no vendor's product has", "fp8", 70, 72, 40),
    FloatCase("fp8_vendor", "more rows than the kernel takes, in a shape for the vendor's product", "fp8", 70, 256, 64, size="small"),
    FloatCase("int4_deep", "all eight splits, as a large model has them", "int4", 16, 4096, 256, size="small"),
    FloatCase("fp8_deep", "the same in 8-bit floats", "fp8", 16, 4096, 256, size="small"),
    *(
        FloatCase(f"bench_{kind}_{num_rows}_{name}", "a large model's widest and deepest products", kind, num_rows, *shape, size="bench")
        for kind in ("int4", "fp8")
        for num_rows in (1, 8, 16, 64)
        for name, shape in (("gate_up", (4096, 28672)), ("down", (14336, 4096)))
    ),
    FloatCase("bench_int4_128", "where the kernel hands over to the vendor's dense product", "int4", 128, 4096, 14336, size="bench"),
    FloatCase("bench_int4_256", "just behind that", "int4", 256, 4096, 14336, size="bench"),
    FloatCase("bench_fp8_4096", "a prompt through 8-bit floats", "fp8", 4096, 4096, 14336, size="bench"),
)


def build_float(
    case: FloatCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, GroupedWeight | Fp8Weight]:
    """(x [M, in], weight) of a case. The weight's numbers lie around a third of their spread, so that groups have offsets. Those of a
    timing are drawn on the device, which takes no time there."""
    at = torch.device(device if case.size == "bench" else "cpu")
    generator = torch.Generator(at).manual_seed(seed)
    x = torch.randn((case.num_rows, case.in_features), generator=generator, device=at).to(device, dtype)
    dense = (torch.randn((case.out_features, case.in_features), generator=generator, device=at) + 0.3).to(device)
    if case.zero_row:
        x[0], dense[0] = 0, 0
    if case.kind == "fp8":
        return x, quantize_fp8(dense)
    return x, quantize_grouped(dense, 4 if case.kind == "int4" else 8)
