"""Named inputs of the int8 product as data, and how to build their tensors: one list for tests, benchmarks and docs.

No expectations here; dense products are the vendor's and need no case. Called by `tests/kernels` and `bench/kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.linear.reference import quantize_int8
from kernels.ops import Int8Weight


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
