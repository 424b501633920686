"""Named inputs of the norm as data, and how to build their tensors: one list for tests, benchmarks and docs.

No expectations here. Called by `tests/kernels` and `bench/kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

EPS = 1e-5


@dataclass(frozen=True, slots=True)
class NormCase:
    """spread: standard deviation of x; 0 is a row of zeros."""

    name: str
    why: str
    num_rows: int
    width: int
    has_residual: bool = True
    spread: float = 1.0
    size: Literal["tiny", "small", "bench"] = "tiny"


CASES = (
    NormCase("first_layer", "no residual yet: x itself comes back", 2, 64, has_residual=False),
    NormCase("padded_width", "576 columns in a tile of 1024: empty ones must not count in the mean", 3, 576),
    NormCase("narrow", "fewer columns than a warp has lanes", 5, 24),
    NormCase("zeros", "a row of zeros is kept from division by zero by eps alone", 2, 64, has_residual=False, spread=0.0),
    NormCase("large", "squares that leave float16's range must be float32", 2, 128, spread=900.0),
    NormCase("wide", "a width of a large model", 4, 5120, size="small"),
    NormCase("bench_decode", "a full batch of decodes", 64, 576, size="bench"),
    NormCase("bench_prefill", "a full token budget", 8192, 4096, size="bench"),
)


def build(
    case: NormCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor | None, Tensor, float]:
    """(x [T, D], residual [T, D] or None, weight [D], eps) of a case."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = (normal(case.num_rows, case.width) * case.spread).to(device, dtype)
    residual = (normal(case.num_rows, case.width) * case.spread).to(device, dtype) if case.has_residual else None
    return x, residual, (1 + normal(case.width) / 4).to(device, dtype), EPS
