"""Bits of e4m3 on Triton's interpreter: every code there and back, against torch. The cases of quantised pools run with all the others."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from kernels.attention.triton import unpacked
from kernels.kv_write.triton import e4m3_bits


@triton.jit
def encode_kernel(x_ptr, codes_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, N)
    tl.store(codes_ptr + at, e4m3_bits(tl.load(x_ptr + at)))


@triton.jit
def decode_kernel(words_ptr, y_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.arange(0, N)[:, None]
    at = row * 4 + tl.arange(0, 4)[None, :]
    y = tl.load(y_ptr + at)
    tl.store(y_ptr + at, unpacked(tl.load(words_ptr + row), y))


def encoded(x: torch.Tensor) -> torch.Tensor:
    codes = torch.zeros(len(x), dtype=torch.uint8)
    encode_kernel[(1,)](x, codes, N=len(x))
    return codes


def numbers() -> tuple[torch.Tensor, torch.Tensor]:
    """All codes but the two of NaN, and what they stand for."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = torch.where((codes & 0x7F) == 0x7F, 0, codes).to(torch.uint8)
    return codes, codes.view(torch.float8_e4m3fn).float()


def test_every_code_is_encoded_as_itself() -> None:
    codes, values = numbers()
    assert torch.equal(encoded(values), codes)


def test_rounding_is_to_the_nearest_and_ties_are_even() -> None:
    _, values = numbers()
    ordered = values.unique()
    middles = (ordered[1:] + ordered[:-1]) / 2  # exact in float32
    for x in (middles, torch.nextafter(middles, middles + 1000), torch.nextafter(middles, middles - 1000)):
        x = torch.nn.functional.pad(x, (0, 256 - len(x)))
        assert torch.equal(encoded(x), x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_random_numbers_are_encoded_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, generator=generator) * torch.randn(4096, generator=generator).mul(4).exp()
    x = x.clamp(-448, 448)
    assert torch.equal(encoded(x), x.to(torch.float8_e4m3fn).view(torch.uint8))


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def decoded(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.zeros(256, dtype=dtype)
    decode_kernel[(1,)](words, y, N=64)
    return y.float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_is_unpacked_without_rounding(dtype: torch.dtype) -> None:
    codes, values = numbers()
    assert torch.equal(decoded(codes.view(torch.uint32), dtype), values)
    whole = torch.arange(-128, 128, dtype=torch.int8)
    assert torch.equal(decoded(whole.view(torch.int32), dtype), whole.float())
