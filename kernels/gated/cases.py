"""Named inputs of the gated activation as data, and how to build their tensors: one list for tests, benchmarks and docs.

No expectations here. Called by `tests/kernels` and `bench/kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.ops import Activation


@dataclass(frozen=True, slots=True)
class GatedCase:
    """spread: standard deviation of gate and up."""

    name: str
    why: str
    num_rows: int
    width: int
    activation: Activation = "silu"
    spread: float = 1.0
    size: Literal["tiny", "small", "bench"] = "tiny"


CASES = (
    GatedCase("short_row", "less than one tile", 3, 48),
    GatedCase("ragged_row", "a tile and a bit: gate and up must not mix at the seam", 2, 1536),
    GatedCase("steep", "gates beyond the range of exp must become 0 or the gate, not NaN", 2, 96, spread=60.0),
    GatedCase("gelu", "the other activation", 3, 200, "gelu_tanh"),
    GatedCase("gelu_steep", "the cube in the gelu must not overflow into NaN", 2, 96, "gelu_tanh", spread=60.0),
    GatedCase("bench_decode", "a full batch of decodes", 64, 1536, size="bench"),
    GatedCase("bench_prefill", "a full token budget", 8192, 14336, size="bench"),
)


def build(case: GatedCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Tensor, Activation]:
    """(gate_up [T, 2F], activation) of a case."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn((case.num_rows, 2 * case.width), generator=generator) * case.spread).to(device, dtype), case.activation
