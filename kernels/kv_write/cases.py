"""Named inputs of the K/V write as data, and how to build their tensors: one list for tests, benchmarks and docs.

No expectations here. Called by `tests/kernels` and `bench/kernels`.
Shape suffixes: T tokens, N query heads, K key/value heads, H head width, P places in a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.ops import AttentionSpec, LayerSpec, LayerWeights, PagedBatch, PagedKV

NUM_POSITIONS = 512
PoolKind = Literal["plain", "int8", "fp8"]
POOL_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class KVWriteCase:
    """padded: how many of the tokens at the end have slot -1. pool: what it holds, numbers in the input's dtype or quantised ones."""

    name: str
    why: str
    num_tokens: int
    num_heads: int = 3
    num_kv_heads: int = 1
    head_width: int = 64
    block_size: int = 16
    padded: int = 0
    has_norms: bool = False
    pool: PoolKind = "plain"
    size: Literal["tiny", "small", "bench"] = "tiny"


CASES = (
    KVWriteCase("one_token", "a decode of one sequence: most rows of the tile are empty", 1),
    KVWriteCase("normed", "norms of queries and keys, two key/value heads", 6, 4, 2, has_norms=True),
    KVWriteCase("padded", "a padded row must not touch the pool", 7, padded=3),
    KVWriteCase("all_padded", "a graph is captured on padding alone", 4, padded=4),
    KVWriteCase("odd_width", "half a head of 24 columns is no power of two", 5, head_width=48, block_size=12, has_norms=True),
    KVWriteCase("widest", "head width 256", 4, 2, 2, 256, has_norms=True),
    KVWriteCase("int8", "a scale for each head of a token, and a padded row", 6, 4, 2, padded=1, has_norms=True, pool="int8"),
    KVWriteCase("fp8", "the same of e4m3, at a width that is no power of two", 6, 4, 2, 48, 12, 1, has_norms=True, pool="fp8"),
    KVWriteCase("prompt_int8", "many tiles of int8", 41, 6, 2, size="small", pool="int8"),
    KVWriteCase("prompt_fp8", "many tiles of e4m3", 41, 6, 2, 128, size="small", pool="fp8"),
    KVWriteCase("prompt", "many tiles of tokens", 133, 9, 3, size="small"),
    KVWriteCase("bench_decode", "a full batch of decodes", 64, 9, 3, size="bench"),
    KVWriteCase("bench_prefill", "a full token budget", 8192, 32, 8, 128, has_norms=True, size="bench"),
)


def build(
    case: KVWriteCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, LayerWeights, Tensor, PagedKV]:
    """(qkv [T, (N + 2K) * H], weights, positions [T], kv) of a case; the pool starts as zeros, keys beside values."""
    generator = torch.Generator().manual_seed(seed)
    heads, width, num_tokens = case.num_heads + 2 * case.num_kv_heads, case.head_width, case.num_tokens

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    num_blocks = num_tokens // case.block_size + 3
    shape = (num_blocks, 2, case.num_kv_heads, case.block_size, width)
    pool = torch.zeros(shape, dtype=POOL_DTYPES.get(case.pool, dtype), device=device)
    scales = (None, None) if case.pool == "plain" else torch.zeros(shape[:-1], device=device).unbind(1)
    slots = torch.randperm(num_blocks * case.block_size, generator=generator)[:num_tokens]
    slots[num_tokens - case.padded :] = -1
    angles = torch.rand((NUM_POSITIONS, width // 2), generator=generator, dtype=torch.float64) * 6.3
    norm = normal(2, width) if case.has_norms else None
    weights = LayerWeights(
        spec=LayerSpec(case.num_heads, case.num_kv_heads, width, AttentionSpec(1.0), 1e-5, "silu"),
        attention_norm=normal(1),
        qkv=normal(1, 1),
        out=normal(1, 1),
        mlp_norm=normal(1),
        gate_up=normal(1, 1),
        down=normal(1, 1),
        rotary=torch.stack((angles.cos(), angles.sin()), dim=1).float().to(device),
        q_norm=None if norm is None else norm[0],
        k_norm=None if norm is None else norm[1],
    )
    positions = torch.randint(NUM_POSITIONS, (num_tokens,), generator=generator).to(device)
    kv = PagedKV(pool[:, 0], pool[:, 1], _batch(slots.to(device)), *scales)
    return normal(num_tokens, heads * width), weights, positions, kv


def _batch(slots: Tensor) -> PagedBatch:
    """The slots alone matter here; the rest is an empty batch of attention."""
    nothing = torch.zeros(1, dtype=torch.int32, device=slots.device)
    return PagedBatch(slots, nothing[:0].view(0, 1), nothing, nothing[:0], num_decodes=0, max_query_len=0, max_context_len=0)
