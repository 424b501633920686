"""Products by dense matrices, the fused ops of a decode step and dependent launches on the device: cases and rule as on the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dependent
from kernels.linear import cases as linear_cases
from kernels.ops import LayerWeights, PagedKV, select_ops
from tests.kernels import checks_dense

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HALVES = (torch.float16, torch.bfloat16)
DENSE = [case for case in linear_cases.DENSE_CASES if case.size != "bench"]
LAYERS = [case for case in linear_cases.LAYER_CASES if case.size != "bench"]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [case for case in DENSE if case.num_rows <= 16], ids=lambda case: case.name)
def test_narrow(case: linear_cases.DenseCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.linear import narrow_triton

    checks_dense.check_product(narrow_triton, case, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_tiled(case: linear_cases.DenseCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.linear import tiled_triton

    if case.size == "huge" and dtype == torch.float32:
        pytest.skip("the half-width dtypes pass 2 ** 31 elements in half the memory")
    checks_dense.check_product(tiled_triton, case, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_bias_and_residual(dtype: torch.dtype) -> None:
    checks_dense.check_added(dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(1024, 3072), (4096, 4096), (96, 6912)], ids=str)
def test_a_row_does_not_know_its_neighbours(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = linear_cases.DenseCase("", "", 1, shape[1], shape[0])
    checks_dense.check_rows_for_themselves(select_ops("triton", deterministic=True).linear, case, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_fused(case: linear_cases.LayerCase, monkeypatch: pytest.MonkeyPatch) -> None:
    checks_dense.check_qkv(case, torch.bfloat16, "cuda", monkeypatch)
    monkeypatch.undo()
    checks_dense.check_gate_up(case, torch.bfloat16, "cuda", monkeypatch)


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_the_back_end_fuses_a_layer(case: linear_cases.LayerCase) -> None:
    checks_dense.check_layer(case, "cuda")


def chain(x: Tensor, weights: LayerWeights, positions: Tensor, kv: PagedKV, ops: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Eight layers of the same weights, the queries in place of what attention gives: products, norms and writes behind one another."""
    kv.keys.zero_()
    kv.values.zero_()
    rows = x.clone()
    residual: Tensor | None = None  # without a residual the sum is x itself, and sums are added to in place
    for _ in range(8):
        q, residual = ops.qkv(rows, residual, weights, positions, kv)
        rows, residual = ops.out_mlp(q.flatten(1), residual, weights)
    assert residual is not None
    return rows, residual, kv.keys.clone()


@pytest.mark.parametrize("is_deterministic", [False, True], ids=["fused", "deterministic"])
@pytest.mark.parametrize("num_rows", [1, 16])
def test_dependent_launches_change_no_bit(num_rows: int, is_deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager, and replayed from a graph many times: a kernel that read what its predecessor had not yet written would show."""
    case = linear_cases.LayerCase("", "", num_rows, 2048, 16, 4, 128, 4096)
    x, _, weights, positions, kv = linear_cases.build_layer(case, torch.bfloat16, "cuda")
    ops = select_ops("triton", deterministic=is_deterministic)
    with monkeypatch.context() as patch:
        patch.setattr(dependent, "IS_ON", False)
        expected = chain(x, weights, positions, kv, ops)
    got = chain(x, weights, positions, kv, ops)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(x, weights, positions, kv, ops)
    for _ in range(50):
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
