"""From the rows of the q/k/v product to rotated queries and stored keys and values, in plain PyTorch.

No Triton here and no model. Called by `reference_ops`, by back ends without a kernel of their own, and by tests.
Shape suffixes: T tokens, N query heads, K key/value heads, H head width, B blocks, P places in a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.norm.reference import rms_norm
from kernels.ops import LayerWeights, PagedKV

LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}
"""Of the numbers that a quantised pool may hold."""


def kv_write(qkv: Tensor, weights: LayerWeights, positions_T: Tensor, kv: PagedKV) -> Tensor:
    """q [T, N, H] in the input's dtype from qkv [T, (N + 2K) * H], whose bias is already in. positions int64 [T].

    Norm and rotation are float32 or wider and rounded once. A row whose slot is -1 is returned but not stored.
    A pool of int8 or float8_e4m3fn gets each head of a token by its own scale (`quantize_heads`).
    Mutates: kv.keys, kv.values and their scales at the batch's slots.
    """
    spec = weights.spec
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).view(len(qkv), -1, spec.head_width)
    q, k, v = torch.split(wide, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
    if weights.q_norm is not None:
        q, _ = rms_norm(q, None, weights.q_norm, spec.norm_eps)
    if weights.k_norm is not None:
        k, _ = rms_norm(k, None, weights.k_norm, spec.norm_eps)
    rotary = weights.rotary[positions_T]
    _store(rotate(k, rotary), v, kv)
    return rotate(q, rotary).to(qkv.dtype)


def rotate(x_THH: Tensor, rotary: Tensor) -> Tensor:
    """Turns the pairs (i, i + H / 2) of x [T, heads, H] by each token's angles; rotary [T, 2, H / 2] is cos, then sin.

    Source: Su et al. 2021 (RoFormer), section 3.4.2, in the half-split order of the public checkpoints.
    """
    cos, sin = rotary.to(x_THH.dtype)[:, None].unbind(2)
    low, high = x_THH.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def _store(k_TKH: Tensor, v_TKH: Tensor, kv: PagedKV) -> None:
    slots, block_size = kv.batch.slots, kv.keys.shape[2]
    written = slots >= 0
    if not bool(written.all()):
        slots, k_TKH, v_TKH = slots[written], k_TKH[written], v_TKH[written]
    block, place = slots // block_size, slots % block_size
    for pool, scales, numbers in ((kv.keys, kv.key_scales, k_TKH), (kv.values, kv.value_scales, v_TKH)):
        if scales is None:
            pool[block, :, place] = numbers.to(pool.dtype)
        else:
            pool[block, :, place], scales[block, :, place] = quantize_heads(numbers, pool.dtype)


def quantize_heads(x_TKH: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(numbers [T, K, H] in `dtype`, int8 or float8_e4m3fn; scales float32 [T, K]) with x ~ numbers * scales[..., None].

    A scale is a head's absolute maximum by the largest number of the dtype (1 for zeros); rounded to the nearest, ties to even.
    """
    wide = x_TKH.to(torch.promote_types(x_TKH.dtype, torch.float32))
    scales = wide.abs().amax(-1) / LARGEST[dtype]
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    numbers = (wide / scales[..., None]).clamp_(-LARGEST[dtype], LARGEST[dtype])
    return (numbers.round_() if dtype is torch.int8 else numbers).to(dtype), scales.float()
