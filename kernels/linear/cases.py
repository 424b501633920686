"""Named inputs of the products by quantised weights as data, and how to build their tensors: for tests, benchmarks and docs.

No expectations here; dense products are the vendor's and need no case. Called by `tests/kernels` and `bench/kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.linear.reference import quantize_fp8, quantize_grouped, quantize_int8
from kernels.ops import Fp8Weight, GroupedWeight, Int8Weight


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


@dataclass(frozen=True, slots=True)
class FloatCase:
    """A product whose x stays as it is, by numbers in groups (of 4 or 8 bits) or by 8-bit floats. zero_row: as in `LinearCase`; the first
    row of the weight is zeros then too."""

    name: str
    why: str
    kind: Literal["int4", "groups8", "fp8"]
    num_rows: int
    in_features: int
    out_features: int
    zero_row: bool = False
    size: Literal["tiny", "small", "bench"] = "tiny"


FLOAT_CASES = (
    FloatCase("int4_one_group", "less than one chunk of inputs", "int4", 1, 32, 64),
    FloatCase("int4_ragged", "no side is a multiple of its tile", "int4", 5, 288, 70),
    FloatCase("int4_zeros", "a group of equal numbers has no scale", "int4", 3, 128, 40, zero_row=True),
    FloatCase("int4_splits", "inputs in two splits, sixteen rows in a tile", "int4", 12, 1056, 65),
    FloatCase("int4_tiles", "more rows than the largest tile holds", "int4", 40, 160, 48),
    FloatCase("int4_dense", "more rows than the kernel takes", "int4", 130, 96, 40),
    FloatCase("groups8_ragged", "8 bits, half a chunk of inputs is missing", "groups8", 5, 288, 70),
    FloatCase("groups8_splits", "8 bits, inputs in three splits", "groups8", 9, 800, 65),
    FloatCase("groups8_dense", "8 bits, more rows than the kernel takes", "groups8", 130, 64, 40),
    FloatCase("fp8_ragged", "no side is a multiple of its tile", "fp8", 5, 200, 70),
    FloatCase("fp8_zeros", "a row of zeros has no scale of its own", "fp8", 3, 64, 64, zero_row=True),
    FloatCase("fp8_splits", "inputs in two splits, sixteen rows in a tile", "fp8", 12, 1100, 65),
    FloatCase("fp8_tiles", "more rows than the largest tile holds", "fp8", 40, 96, 48),
    FloatCase("fp8_dense", "more rows than the kernel takes, in a shape that no vendor's product has", "fp8", 70, 72, 40),
    FloatCase("fp8_vendor", "more rows than the kernel takes, in a shape for the vendor's product", "fp8", 70, 256, 64, size="small"),
    FloatCase("int4_deep", "all eight splits, as a large model has them", "int4", 16, 4096, 256, size="small"),
    FloatCase("fp8_deep", "the same in 8-bit floats", "fp8", 16, 4096, 256, size="small"),
    *(
        FloatCase(f"bench_{kind}_{num_rows}_{name}", "a large model's widest and deepest products", kind, num_rows, *shape, size="bench")
        for kind in ("int4", "fp8")
        for num_rows in (1, 8, 16, 64)
        for name, shape in (("gate_up", (4096, 28672)), ("down", (14336, 4096)))
    ),
    FloatCase("bench_int4_128", "where the kernel hands over to the vendor's dense product", "int4", 128, 4096, 14336, size="bench"),
    FloatCase("bench_int4_256", "just behind that", "int4", 256, 4096, 14336, size="bench"),
    FloatCase("bench_fp8_4096", "a prompt through 8-bit floats", "fp8", 4096, 4096, 14336, size="bench"),
)


def build_float(
    case: FloatCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, GroupedWeight | Fp8Weight]:
    """(x [M, in], weight) of a case. The weight's numbers lie around a third of their spread, so that groups have offsets. Those of a
    timing are drawn on the device, which takes no time there."""
    at = torch.device(device if case.size == "bench" else "cpu")
    generator = torch.Generator(at).manual_seed(seed)
    x = torch.randn((case.num_rows, case.in_features), generator=generator, device=at).to(device, dtype)
    dense = (torch.randn((case.out_features, case.in_features), generator=generator, device=at) + 0.3).to(device)
    if case.zero_row:
        x[0], dense[0] = 0, 0
    if case.kind == "fp8":
        return x, quantize_fp8(dense)
    return x, quantize_grouped(dense, 4 if case.kind == "int4" else 8)
