"""What products by numbers in groups and by 8-bit floats must do, case by case and on any device. Shared by interpreter and GPU runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import cases, fp8_triton, grouped_triton, reference, triton
from kernels.linear.cases import FloatCase
from kernels.linear.fp8_triton import PackedFp8
from kernels.linear.grouped_triton import PackedGroups
from kernels.ops import Fp8Weight, GroupedWeight
from tests.kernels.rule import assert_earned, guard_module


def check_float_product(case: FloatCase, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As close as the same weight, dense and rounded to x's dtype; arrivals are back at zero; equal when it is asked again."""
    x, weight = cases.build_float(case, dtype, device)
    dense = reference.dense_of_fp8(weight) if isinstance(weight, Fp8Weight) else reference.dense_of(weight)
    packed = triton.pack(weight)
    assert isinstance(packed, GroupedWeight | Fp8Weight)
    state = packed.packed
    assert isinstance(state, PackedGroups | PackedFp8)
    guards = guard_module(monkeypatch, fp8_triton if isinstance(weight, Fp8Weight) else grouped_triton)
    got = triton.linear(x, packed)
    if _is_vendors(x, packed):
        values, scales = reference.quantize_rows_fp8(x)
        plain = F.linear((values.float() * scales[:, None]).to(dtype), dense.to(dtype))
    else:
        plain = F.linear(x, dense.to(dtype))
        if isinstance(weight, GroupedWeight) or len(x) <= fp8_triton.MOST_ROWS:  # else only PyTorch's own products write
            guards.check()
    assert_earned(got, plain, x.double() @ dense.double().T)
    assert int(state.arrivals.abs().sum()) == 0
    _check_rows(x, packed, got, device)


def _is_vendors(x: Tensor, weight: GroupedWeight | Fp8Weight) -> bool:
    has_vendor = isinstance(weight.packed, PackedFp8) and weight.packed.has_vendor
    return has_vendor and x.dtype == torch.bfloat16 and len(x) > fp8_triton.MOST_ROWS


def _check_rows(x: Tensor, weight: GroupedWeight | Fp8Weight, got: Tensor, device: str) -> None:
    """A row does not know its neighbours, nor how many they are. The interpreter multiplies tiles with a library whose order depends on
    their size, so there the number of rows stays within a tile."""
    module = fp8_triton if isinstance(weight, Fp8Weight) else grouped_triton
    if len(x) > module.MOST_ROWS:
        return
    sizes = {1, len(x)} if device != "cpu" or len(x) <= module.TILE_ROWS[0] else {len(x)}
    for size in sizes:
        rows = torch.arange(len(x) - 1, len(x) - 1 - size, -1, device=x.device)
        assert torch.equal(triton.linear(x[rows], weight), got[rows])


def check_table(case: FloatCase, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a packed table are those of plain PyTorch to the last bit."""
    _, weight = cases.build_float(case, dtype, device)
    last = case.out_features - 1
    ids = torch.tensor([0, last, 3, 3], device=device)
    guards = guard_module(monkeypatch, grouped_triton)
    got = triton.embed(ids, triton.pack(weight), dtype)
    guards.check()
    expected = reference.embed(ids, weight, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, expected) if device == "cpu" else bool((got - expected).abs().max() <= expected.abs().max() * 2**-8)
