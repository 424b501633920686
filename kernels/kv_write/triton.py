"""From the rows of the q/k/v product to rotated queries and stored keys and values: one Triton kernel, four tokens of one head a program.

No model here. Called by `triton_ops`.
Shape suffixes: T tokens, N query heads, K key/value heads, H head width, P places in a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_write.pool import pool_tensors
from kernels.ops import LayerWeights, PagedKV

TOKENS = 4
"""Fixed, whatever T: the order in which a norm's squares are summed would otherwise depend on the batch."""


def kv_write(qkv: Tensor, weights: LayerWeights, positions_T: Tensor, kv: PagedKV) -> Tensor:
    """q [T, N, H] in the input's dtype from qkv [T, (N + 2K) * H], whose bias is already in. positions int64 [T].

    A pool of int8 or float8_e4m3fn gets each head of a token by its own scale, as `quantize_heads` of the reference defines it.
    Mutates: kv.keys, kv.values and their scales at the batch's slots; a slot of -1 writes nothing. Raises: ValueError of `pool_tensors`,
    or when the rotary table is not contiguous.
    """
    keys, values, key_scales, value_scales = pool_tensors(kv)
    if not weights.rotary.is_contiguous():
        raise ValueError("the rotary table must be contiguous")
    spec = weights.spec
    qkv = qkv.contiguous()
    num_tokens, width = qkv.shape[0], spec.head_width
    q = torch.empty((num_tokens, spec.num_heads, width), dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        kv_write_kernel[(triton.cdiv(num_tokens, TOKENS), spec.num_heads + 2 * spec.num_kv_heads)](
            qkv,
            q,
            keys,
            values,
            key_scales,
            value_scales,
            kv.batch.slots,
            positions_T,
            weights.rotary,
            weights.q_norm,
            weights.k_norm,
            num_tokens,
            *kv.keys.stride()[:3],
            spec.norm_eps,
            N=spec.num_heads,
            K=spec.num_kv_heads,
            H=width,
            HALF=triton.next_power_of_2(width // 2),
            P=kv.keys.shape[2],
            TOKENS=TOKENS,
            num_warps=1,
        )
    return q


@triton.jit
def _normed(low, high, norm_ptr, column, is_column, eps, H: tl.constexpr):
    mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / H
    inverse = tl.rsqrt(mean + eps)[:, None]
    weight_low = tl.load(norm_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    weight_high = tl.load(norm_ptr + H // 2 + column, mask=is_column, other=0.0).to(tl.float32)
    return low * inverse * weight_low[None, :], high * inverse * weight_high[None, :]


@triton.jit
def _rotated(low, high, rotary_ptr, position, column, readable, H: tl.constexpr):
    at = rotary_ptr + position[:, None] * H + column[None, :]
    cos = tl.load(at, mask=readable, other=0.0)
    sin = tl.load(at + H // 2, mask=readable, other=0.0)
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _stored(low, high, at, mask, H: tl.constexpr):
    tl.store(at, low.to(at.dtype.element_ty), mask=mask)
    tl.store(at + H // 2, high.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _quantized(low, high, kind: tl.constexpr):
    """(two halves of numbers, scale [TOKENS]) of float32 halves [TOKENS, HALF], whose idle columns are zeros; kind: int8, or uint8 for the
    bits of e4m3. Divided as IEEE says, so that a number is the reference's."""
    LARGEST: tl.constexpr = 127.0 if kind == tl.int8 else 448.0
    most = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    scale = tl.div_rn(most, LARGEST)
    scale = tl.where(scale > 0, scale, 1.0)
    low = tl.minimum(tl.maximum(tl.div_rn(low, scale[:, None]), -LARGEST), LARGEST)
    high = tl.minimum(tl.maximum(tl.div_rn(high, scale[:, None]), -LARGEST), LARGEST)
    if kind == tl.int8:
        # Adding and taking away 1.5 * 2 ** 23 rounds to the nearest whole number, ties to even, in plain float32 arithmetic.
        kept_low, kept_high = ((low + 12582912.0) - 12582912.0).to(kind), ((high + 12582912.0) - 12582912.0).to(kind)
    else:
        kept_low, kept_high = e4m3_bits(low), e4m3_bits(high)
    return kept_low, kept_high, scale


@triton.jit
def e4m3_bits(x):
    """uint8: the e4m3 number nearest to a float32 of at most 448, ties to even. In whole numbers, since chips before sm_89 have no e4m3
    and what is written must not depend on the chip. Source: Micikevicius et al. 2022, table 1."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)  # 3 bits of mantissa; the exponent's bias is 7, not 127
    # Below 2 ** -6 numbers are 2 ** -9 apart, as float32 is above 2 ** 14: adding that rounds, and leaves the number in the last bits.
    small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    return (tl.where(magnitude < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit(do_not_specialize=["num_tokens"])
def kv_write_kernel(
    qkv_ptr, q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, slots_ptr, positions_ptr, rotary_ptr, q_norm_ptr, k_norm_ptr,
    num_tokens, stride_block, stride_head, stride_place, eps,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head, as the two halves of the width that rotation pairs. Heads come in the order query, key, value.

    q_norm_ptr and k_norm_ptr may be None, and the scales' pointers of a plain pool. The pool's blocks may be strided, and scales lie as the
    rows do; offsets into it are 64-bit.
    """
    head = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, HALF)
    is_token = token < num_tokens
    is_column = column < H // 2
    readable = is_token[:, None] & is_column[None, :]
    source = qkv_ptr + token.to(tl.int64)[:, None] * ((N + 2 * K) * H) + head * H + column[None, :]
    low = tl.load(source, mask=readable, other=0.0).to(tl.float32)
    high = tl.load(source + H // 2, mask=readable, other=0.0).to(tl.float32)
    if head < N + K:
        if head < N:
            if q_norm_ptr is not None:
                low, high = _normed(low, high, q_norm_ptr, column, is_column, eps, H)
        else:
            if k_norm_ptr is not None:
                low, high = _normed(low, high, k_norm_ptr, column, is_column, eps, H)
        position = tl.load(positions_ptr + token, mask=is_token, other=0).to(tl.int64)
        low, high = _rotated(low, high, rotary_ptr, position, column, readable, H)
    if head < N:
        _stored(low, high, q_ptr + (token.to(tl.int64)[:, None] * N + head) * H + column[None, :], readable, H)
    else:
        slot = tl.load(slots_ptr + token, mask=is_token, other=-1).to(tl.int64)
        place = (slot // P) * stride_block + (slot % P) * stride_place
        written = (slot >= 0)[:, None] & is_column[None, :]
        kv_head = tl.where(head < N + K, head - N, head - N - K).to(tl.int64)
        if k_scale_ptr is not None:
            kept_low, kept_high, scale = _quantized(low, high, k_ptr.dtype.element_ty)
            row = (slot // P) * (stride_block // H) + (slot % P) * (stride_place // H) + kv_head * (stride_head // H)
            if head < N + K:
                tl.store(k_scale_ptr + row, scale, mask=slot >= 0)
            else:
                tl.store(v_scale_ptr + row, scale, mask=slot >= 0)
        else:
            kept_low, kept_high = low, high
        if head < N + K:
            _stored(kept_low, kept_high, k_ptr + kv_head * stride_head + place[:, None] + column[None, :], written, H)
        else:
            _stored(kept_low, kept_high, v_ptr + kv_head * stride_head + place[:, None] + column[None, :], written, H)
