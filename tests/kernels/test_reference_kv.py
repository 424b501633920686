"""What quantised keys and values are: numbers, scales, how far they are from what was written, and which places are touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.kv_write.cases import CASES, KVWriteCase, build
from kernels.kv_write.pool import pool_tensors, pool_words
from kernels.kv_write.reference import kv_write, quantize_heads
from kernels.linear.reference import quantize_rows
from tests.kernels.checks_kv import assert_nearest

FP8 = torch.float8_e4m3fn
QUANTISED = [case for case in CASES if case.pool != "plain"]


def heads(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[7, 3, 48] of very different sizes; one of zeros."""
    x = torch.randn(7, 3, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7)[:, None, None]
    x[4, 1] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_int8_is_what_rows_of_int8_are_everywhere(dtype: torch.dtype) -> None:
    x = heads(dtype)
    numbers, scales = quantize_heads(x, torch.int8)
    expected, of_rows = quantize_rows(x.flatten(0, 1))
    assert torch.equal(numbers.flatten(0, 1), expected)
    assert torch.equal(scales.flatten(), of_rows.float())


def test_e4m3_is_within_a_sixteenth_of_each_number() -> None:
    """Three bits of mantissa: half a step is 1 / 16 of a number, or 2 ** -10 of what the least step is multiplied by."""
    x = heads()
    numbers, scales = quantize_heads(x, FP8)
    assert numbers.dtype == FP8
    assert scales.dtype == torch.float32
    error = (numbers.float() * scales[..., None] - x).abs()
    assert bool((error <= x.abs() / 16 * 1.0001 + scales[..., None] * 2.0**-10).all())
    largest = numbers.float().abs().amax(-1)
    assert largest[4, 1] == 0
    assert bool((largest.flatten().sort().values[1:] == 448).all())


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
def test_a_head_of_numbers_is_kept_as_it_is(dtype: torch.dtype) -> None:
    if dtype is FP8:
        every = torch.arange(256, dtype=torch.uint8)
        values = every[(every & 0x7F) != 0x7F].view(FP8).float()
    else:
        values = torch.arange(-127, 128).float()
    numbers, scales = quantize_heads(values.view(1, 1, -1) / 8, dtype)
    assert float(scales) == 1 / 8
    assert torch.equal(numbers.float().flatten(), values)


@pytest.mark.parametrize("case", QUANTISED, ids=lambda case: case.name)
def test_written_are_the_nearest_numbers_and_no_other_place(case: KVWriteCase) -> None:
    qkv, weights, positions, kv = build(case, torch.float32)
    plain = build(replace(case, pool="plain"), torch.float64)
    assert kv.key_scales is not None
    assert kv.value_scales is not None
    q = kv_write(qkv, weights, positions, kv)
    exact = plain[3]
    torch.testing.assert_close(q.double(), kv_write(qkv.double(), weights, positions, exact), rtol=1e-5, atol=1e-5)
    written = kv.batch.slots[kv.batch.slots >= 0]
    place = (written // case.block_size, slice(None), written % case.block_size)
    for numbers, scales, rows in ((kv.keys, kv.key_scales, exact.keys), (kv.values, kv.value_scales, exact.values)):
        assert_nearest(numbers[place].double(), scales[place].double(), rows[place], numbers.dtype)
        assert int((scales != 0).sum()) == len(written) * case.num_kv_heads
        assert not scales[numbers.float().abs().sum(-1) == 0].any()


def test_pools_that_the_kernels_cannot_read_are_refused() -> None:
    _, _, _, kv = build(QUANTISED[0], torch.float32)
    assert kv.key_scales is not None
    with pytest.raises(ValueError, match="must have scales"):
        pool_tensors(replace(kv, key_scales=None, value_scales=None))
    with pytest.raises(ValueError, match="must have scales"):
        pool_tensors(replace(kv, value_scales=None))
    with pytest.raises(ValueError, match="scales must lie as rows do"):
        pool_tensors(replace(kv, key_scales=kv.key_scales.clone(memory_format=torch.contiguous_format)))
    with pytest.raises(ValueError, match="equal strides"):
        pool_tensors(replace(kv, keys=kv.keys.clone()))
    with pytest.raises(ValueError, match="multiple of 4"):
        pool_words(build(replace(QUANTISED[0], head_width=6), torch.float32)[3])
