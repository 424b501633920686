"""What a quantised K/V pool asks of the kernels: numbers and scales that are the reference's, and nothing touched beside them.

Called by `checks` for the cases that have such a pool.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.kv_write import cases as kv_write_cases
from kernels.kv_write import reference as kv_write_reference
from kernels.kv_write.reference import quantize_heads
from kernels.ops import PagedKV
from tests.kernels.rule import assert_earned, assert_guards_whole, guard_module, guarded

UNTOUCHED = 77


def widened(kv: PagedKV) -> PagedKV:
    """The same numbers and scales in float64."""
    scales = (None if x is None else x.double() for x in (kv.key_scales, kv.value_scales))
    return PagedKV(kv.keys.double(), kv.values.double(), kv.batch, *scales)


def dequantised(kv: PagedKV, dtype: torch.dtype) -> PagedKV:
    """What plain PyTorch would attend to: numbers times scales, held in the dtype of queries."""
    if kv.key_scales is None or kv.value_scales is None:
        return kv
    keys, values = ((x.float() * scales[..., None]).to(dtype) for x, scales in ((kv.keys, kv.key_scales), (kv.values, kv.value_scales)))
    return PagedKV(keys, values, kv.batch)


def check_quantised_write(case: kv_write_cases.KVWriteCase, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number is the nearest to the exact one by the scale that stands beside it, each scale that of the exact head, to the rounding
    of the norm and the rotation in front; q is what it is beside a plain pool."""
    from kernels.kv_write import triton

    qkv, weights, positions, kv = kv_write_cases.build(case, dtype, device)
    shape = (kv.keys.shape[0], 2, *kv.keys.shape[1:])
    codes, memory = guarded(shape, torch.uint8, device)
    scales, scale_memory = guarded(shape[:-1], torch.float32, device)
    pool = codes.view(kv.keys.dtype)
    guards = guard_module(monkeypatch, triton)
    got = triton.kv_write(qkv, weights, positions, PagedKV(pool[:, 0], pool[:, 1], kv.batch, scales[:, 0], scales[:, 1]))
    guards.check()
    assert_guards_whole(memory)
    assert_guards_whole(scale_memory)
    exact = torch.zeros(shape, dtype=torch.float64, device=device)
    wide = PagedKV(exact[:, 0], exact[:, 1], kv.batch)
    assert_earned(
        got,
        kv_write_reference.kv_write(qkv, weights, positions, kv),
        kv_write_reference.kv_write(qkv.double(), weights, positions, wide),
    )
    written = kv.batch.slots[kv.batch.slots >= 0]
    is_written = torch.zeros(shape[0] * case.block_size, dtype=torch.bool, device=device)
    is_written[written] = True
    for tensor in (codes, scales[..., None]):
        assert bool((_by_place(tensor)[~is_written] == UNTOUCHED).all()), "a slot that no token has was written"
    numbers, by_row, rows = _by_place(pool.double())[written], _by_place(scales[..., None])[written], _by_place(exact)[written]
    assert_nearest(numbers, by_row[..., 0].double(), rows, pool.dtype)


def assert_nearest(numbers: Tensor, scales: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """numbers [..., H] and scales [...] stand for exact [..., H], all float64. A millionth of a head's largest number is the rounding of
    float32 norms and rotations."""
    most = exact.abs().amax(-1)
    torch.testing.assert_close(scales, torch.where(most > 0, most / kv_write_reference.LARGEST[dtype], 1.0), rtol=1e-6, atol=0)
    nearest = quantize_heads(exact, dtype)[0].double()
    error = (numbers * scales[..., None] - exact).abs()
    least = (nearest * scales[..., None] - exact).abs()
    assert bool((error <= least + 2e-6 * most[..., None]).all()), "a number is not the nearest that its scale allows"


def _by_place(tensor: Tensor) -> Tensor:
    """[B * P, 2, K, ...] of [B, 2, K, P, ...]."""
    return tensor.permute(0, 3, 1, 2, 4).flatten(0, 1)
