"""Numbers of quantised pools, there and back, every one of them, on any device: bits of e4m3 against torch.

Shared by the run on the interpreter and the run on a GPU; needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.attention.triton import unpacked
from kernels.kv_write.triton import e4m3_bits


@triton.jit  # type: ignore[untyped-decorator]
def encode_kernel(x_ptr, codes_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, N)
    tl.store(codes_ptr + at, e4m3_bits(tl.load(x_ptr + at)))


@triton.jit  # type: ignore[untyped-decorator]
def decode_kernel(words_ptr, y_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.arange(0, N)[:, None]
    at = row * 4 + tl.arange(0, 4)[None, :]
    y = tl.load(y_ptr + at)
    tl.store(y_ptr + at, unpacked(tl.load(words_ptr + row), y))


def encoded(x: torch.Tensor) -> torch.Tensor:
    codes = torch.zeros(len(x), dtype=torch.uint8, device=x.device)
    encode_kernel[(1,)](x, codes, N=len(x))
    return codes


def decoded(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.zeros(256, dtype=dtype, device=words.device)
    decode_kernel[(1,)](words, y, N=64)
    return y.float()


def numbers(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All codes but the two of NaN, and what they stand for."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = torch.where((codes & 0x7F) == 0x7F, 0, codes).to(torch.uint8)
    return codes.to(device), codes.view(torch.float8_e4m3fn).float().to(device)


def check_encoding(device: str) -> None:
    """Each code is its own; what lies between is rounded to the nearest, ties to even, and random numbers as torch rounds them."""
    codes, values = numbers(device)
    assert torch.equal(encoded(values), codes)
    ordered = torch.unique(values.cpu())
    middles = (ordered[1:] + ordered[:-1]) / 2  # exact in float32
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4096, generator=generator) * torch.randn(4096, generator=generator).mul(4).exp()
    for x in (middles, torch.nextafter(middles, middles + 1000), torch.nextafter(middles, middles - 1000), spread.clamp(-448, 448)):
        x = torch.nn.functional.pad(x, (0, 4096 - len(x)))
        assert torch.equal(encoded(x.to(device)).cpu(), x.to(torch.float8_e4m3fn).view(torch.uint8))


def check_unpacking(dtype: torch.dtype, device: str) -> None:
    codes, values = numbers(device)
    assert torch.equal(decoded(codes.view(torch.uint32), dtype), values)
    whole = torch.arange(-128, 128, dtype=torch.int8, device=device)
    assert torch.equal(decoded(whole.view(torch.int32), dtype), whole.float())
