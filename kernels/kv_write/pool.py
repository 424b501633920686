"""A paged pool as the Triton kernels take it: checked, and e4m3 as its bits.

No kernel here. Called by the wrappers of `kv_write/triton.py` and `attention/triton.py`.
Shape suffixes: B blocks, K key/value heads, P places in a block, H head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ops import PagedKV


def pool_tensors(kv: PagedKV) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(keys, values [B, K, P, H], key_scales, value_scales [B, K, P] or None), e4m3 in uint8, so that the pointer's type tells the kernels
    what a pool holds, on chips without e4m3 too.

    Raises: ValueError when keys and values are strided differently, or scales otherwise than the rows of H numbers that they belong to:
    the kernels know one set of strides.
    """
    _check(kv)
    keys, values = kv.keys, kv.values
    if keys.dtype is torch.float8_e4m3fn:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    return keys, values, kv.key_scales, kv.value_scales


def pool_words(kv: PagedKV) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`pool_tensors`, of a quantised pool with four numbers to a word [B, K, P, H / 4]: int8 in int32, e4m3 in uint32.

    Raises: ValueError for a head width that is no multiple of four too.
    """
    _check(kv)
    keys, values = kv.keys, kv.values
    if kv.key_scales is not None:
        if keys.shape[3] % 4:
            raise ValueError(f"a quantised pool needs a head width that is a multiple of 4, and this is {keys.shape[3]}")
        word = torch.int32 if keys.dtype is torch.int8 else torch.uint32
        keys, values = keys.view(word), values.view(word)
    return keys, values, kv.key_scales, kv.value_scales


def _check(kv: PagedKV) -> None:
    keys, values, key_scales, value_scales = kv.keys, kv.values, kv.key_scales, kv.value_scales
    if keys.stride() != values.stride() or keys.stride(3) != 1:
        raise ValueError("keys and values must have equal strides and a contiguous last dimension")
    if (keys.element_size() == 1) != (key_scales is not None) or (key_scales is None) != (value_scales is None):
        raise ValueError("a pool of int8 or float8_e4m3fn, and no other, must have scales of keys and of values")
    if key_scales is None or value_scales is None:
        return
    for scales in (key_scales, value_scales):
        if tuple(stride * keys.shape[3] for stride in scales.stride()) != keys.stride()[:3]:
            raise ValueError(f"scales must lie as rows do: strides {scales.stride()} beside {keys.stride()} of numbers")
