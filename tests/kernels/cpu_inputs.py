"""Random layers, paged batches and K/V pools for the tests of the CPU back end, and the instruction sets this machine can run.

No assertion lives here. Shape suffixes as in kernels/ops.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.cpu.library import load
from kernels.cpu.ops import cpu_ops
from kernels.linear.reference import quantize_grouped, quantize_int8
from kernels.ops import AttentionSpec, Int8Weight, LayerSpec, LayerWeights, Ops, PagedBatch, PagedKV, Weight

needs_library = pytest.mark.skipif(load() is None, reason="the compiled CPU kernels were not built")


def runnable_isas() -> list[str]:
    if load() is None:
        return []
    found = []
    for isa in ("avx512", "avx2", "neon", "generic"):
        try:
            cpu_ops(isa, 1)
        except ValueError:
            continue
        found.append(isa)
    return found


ISAS = runnable_isas()


def random_layer(
    generator: torch.Generator, *, activation: str = "silu", has_bias: bool = False, has_norms: bool = False, bits: int = 0
) -> LayerWeights:
    """Odd sizes on purpose: D is no multiple of 16, and 5 query rows of 48 numbers share a group of none that vectors like. bits: of
    numbers in groups, for which D has to be a multiple of 32; 0 for int8 rows."""
    heads, kv_heads, head_width, width, wide = 6, 2, 48, 96 if bits else 92, 160
    spec = LayerSpec(heads, kv_heads, head_width, AttentionSpec(head_width**-0.5), 1e-5, activation)  # type: ignore[arg-type]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def matrix(rows: int, columns: int) -> Weight:
        dense = normal(rows, columns) / columns**0.5
        return quantize_grouped(dense, bits) if bits else quantize_int8(dense)

    angles = torch.arange(512)[:, None] * 10_000.0 ** (-torch.arange(head_width // 2) / (head_width // 2))
    out = (heads + 2 * kv_heads) * head_width
    return LayerWeights(
        spec=spec,
        attention_norm=1 + normal(width) / 4,
        qkv=matrix(out, width),
        out=matrix(width, heads * head_width),
        mlp_norm=1 + normal(width) / 4,
        gate_up=matrix(2 * wide, width),
        down=matrix(width, wide),
        rotary=torch.stack((angles.cos(), angles.sin()), dim=1),
        qkv_bias=normal(out) if has_bias else None,
        q_norm=1 + normal(head_width) / 4 if has_norms else None,
        k_norm=1 + normal(head_width) / 4 if has_norms else None,
        out_norm=1 + normal(width) / 4 if has_norms else None,
        down_norm=1 + normal(width) / 4 if has_norms else None,
    )


def packed(weights: LayerWeights, ops: Ops) -> LayerWeights:
    return replace(weights, **{name: ops.pack(getattr(weights, name)) for name in ("qkv", "out", "gate_up", "down")})


def dense(weights: LayerWeights) -> LayerWeights:
    """The same numbers as float32 matrices."""

    def matrix(weight: Weight) -> Tensor:
        assert isinstance(weight, Int8Weight)
        return weight.values * weight.scales[:, None]

    return replace(weights, **{name: matrix(getattr(weights, name)) for name in ("qkv", "out", "gate_up", "down")})


def paged_batch(slices: list[tuple[int, int]], block_size: int, num_blocks: int, generator: torch.Generator) -> tuple[PagedBatch, Tensor]:
    """(batch, positions int64 [T]) of sequences given as (start, length), their blocks scattered over the pool; block 0 is nobody's."""
    starts = torch.tensor([0, *(length for _, length in slices)]).cumsum(0)
    contexts = [start + length for start, length in slices]
    counts = [-(-context // block_size) for context in contexts]
    order = torch.randperm(num_blocks - 1, generator=generator) + 1
    table = torch.zeros(len(slices), max(counts), dtype=torch.int32)
    used = 0
    for row, count in enumerate(counts):
        table[row, :count] = order[used : used + count]
        used += count
    assert used < num_blocks
    owner = torch.repeat_interleave(torch.arange(len(slices)), torch.tensor([length for _, length in slices]))
    positions = torch.cat([torch.arange(start, start + length) for start, length in slices])
    lengths = [length for _, length in slices]
    batch = PagedBatch(
        slots=table[owner, positions // block_size].long() * block_size + positions % block_size,
        block_table=table,
        query_start=starts.int(),
        context_len=torch.tensor(contexts, dtype=torch.int32),
        num_decodes=sum(length == 1 for length in lengths),
        max_query_len=max((length for length in lengths if length > 1), default=0),
        max_context_len=max(contexts),
    )
    return batch, positions


def random_kv(batch: PagedBatch, shape: tuple[int, int, int, int], dtype: torch.dtype, generator: torch.Generator) -> PagedKV:
    """A pool [B, K, P, H] inside a larger tensor, so that blocks are strided; block 0 holds NaN, of int8 its scales."""
    pool = torch.randn((shape[0], 2, *shape[1:]), generator=generator)
    if dtype is torch.int8:
        scales = pool.abs().amax(-1) / 127
        pool = (pool / scales[..., None]).round().to(dtype)
        scales[0] = float("nan")
        return PagedKV(pool[:, 0], pool[:, 1], batch, scales[:, 0], scales[:, 1])
    pool = pool.to(dtype)
    pool[0] = float("nan")
    return PagedKV(pool[:, 0], pool[:, 1], batch)


def copied(kv: PagedKV) -> PagedKV:
    scales = [None if x is None else x.clone() for x in (kv.key_scales, kv.value_scales)]
    return PagedKV(kv.keys.clone(), kv.values.clone(), kv.batch, *scales)
