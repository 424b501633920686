"""Quantised K/V compiled ahead of time, as `test_compile` does with plain pools: decode and write never spill."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import cases as attention_cases
from kernels.attention import triton as attention
from kernels.attention.cases import AttentionCase
from kernels.kv_write import cases as kv_write_cases
from kernels.kv_write import triton as kv_write
from kernels.kv_write.cases import PoolKind
from tests.kernels.launches import CHIPS, assert_fits, record

STEP = ((1, 20), (3, 20))
SHAPES = {"64": (3, 1, 64), "128": (8, 1, 128), "256": (4, 1, 256)}
POOLS: list[PoolKind] = ["int8", "fp8"]
USUAL = [("64", "fp8"), ("128", "int8")]
PAIRS = [
    pytest.param(shape, pool, marks=() if (shape, pool) in USUAL else pytest.mark.long, id=f"{shape}-{pool}")
    for shape in SHAPES
    for pool in POOLS
]


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize(("shape", "pool"), PAIRS)
def test_attention(shape: str, pool: PoolKind, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = AttentionCase("", "", STEP, *SHAPES[shape], pool=pool)
    q, kv = attention_cases.build(case, torch.bfloat16)
    launches = record(monkeypatch, attention, lambda: attention.attend(q, kv, case.spec))
    assert [launch.name for launch in launches] == ["decode_kernel", "reduce_kernel", "prefill_kernel"]
    for launch in launches:
        assert_fits(launch, capability, f"{shape} {pool}")


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"),
    [pytest.param(9, 3, 64, marks=pytest.mark.long), (32, 8, 128), pytest.param(4, 1, 256, marks=pytest.mark.long)],
)
def test_write(heads: int, kv_heads: int, width: int, pool: PoolKind, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = kv_write_cases.build(kv_write_cases.KVWriteCase("", "", 8, heads, kv_heads, width, pool=pool), torch.bfloat16)
    (launch,) = record(monkeypatch, kv_write, lambda: kv_write.kv_write(*inputs))
    assert_fits(launch, capability, f"{width} {pool}")
