"""Products by dense matrices and the fused ops of a decode step on Triton's interpreter: the tiny cases, the small ones in the long run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from kernels.linear import cases as linear_cases
from kernels.linear import fused_triton, narrow_triton, tiled_triton
from kernels.ops import select_ops
from tests.kernels import checks_dense
from tests.kernels.interpreter.test_on_interpreter import DTYPES, sized
from tests.kernels.rule import assert_earned

LAYERS = sized(linear_cases.LAYER_CASES)


@pytest.mark.parametrize("case", sized([case for case in linear_cases.DENSE_CASES if case.num_rows <= 16]))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow(case: linear_cases.DenseCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    checks_dense.check_product(narrow_triton, case, dtype, "cpu", monkeypatch)


@pytest.mark.parametrize("tiling", narrow_triton.CANDIDATES, ids=str)
def test_candidates(tiling: narrow_triton.Tiling) -> None:
    x, weight = linear_cases.build_dense(linear_cases.DenseCase("", "", 5, 200, 70), torch.float32)
    exact = x.double() @ weight.double().T
    assert_earned(narrow_triton.product(x, weight, tiling=tiling), torch.nn.functional.linear(x, weight), exact)


@pytest.mark.parametrize("case", sized(linear_cases.DENSE_CASES))
def test_tiled(case: linear_cases.DenseCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dtype a case, in turn."""
    checks_dense.check_product(tiled_triton, case, DTYPES[linear_cases.DENSE_CASES.index(case) % 3], "cpu", monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_residual(dtype: torch.dtype) -> None:
    checks_dense.check_added(dtype, "cpu")


@pytest.mark.parametrize("case", LAYERS)
def test_fused(case: linear_cases.LayerCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, which shows more; the back end fuses bfloat16 alone, see below."""
    checks_dense.check_qkv(case, torch.float32, "cpu", monkeypatch)
    monkeypatch.undo()
    checks_dense.check_gate_up(case, torch.float32, "cpu", monkeypatch)


@pytest.mark.parametrize("case", [one for one in LAYERS if one.id in ("first", "decodes", "post_norms")])
def test_the_back_end_fuses_a_layer(case: linear_cases.LayerCase) -> None:
    checks_dense.check_layer(case, "cpu")


@pytest.mark.long
@pytest.mark.parametrize("case", [one for one in LAYERS if one.id not in ("first", "decodes", "post_norms")])
def test_the_back_end_fuses_any_layer(case: linear_cases.LayerCase) -> None:
    checks_dense.check_layer(case, "cpu")


def test_what_fused_kernels_cannot_do_goes_to_the_composed_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row more, or numbers of another width: no fused kernel is launched, and the layer is right all the same."""

    def refused(*arguments: Any) -> None:
        raise AssertionError("a fused kernel was asked")

    for name in ("normed_qkv", "normed_product", "normed_gate_up"):
        monkeypatch.setattr(fused_triton, name, refused)
    checks_dense.check_layer(linear_cases.LayerCase("", "", 17), "cpu")
    x, residual, weights, positions, kv = linear_cases.build_layer(linear_cases.LayerCase("", "", 2), torch.float16)
    q, _ = select_ops("triton").qkv(x, residual, weights, positions, kv)
    assert q.dtype == torch.float16


def test_a_row_does_not_know_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy picks the order of its sums by shape, which in float64 no longer shows; what is left is the order the kernels choose."""

    def wide_dot(self: Any, a: Any, b: Any, c: Any, *rest: Any) -> Any:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + c.data
        return interpreter.TensorHandle(product.astype(np.float32), c.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", wide_dot)
    case = linear_cases.DenseCase("", "three chunks, the last one ragged", 1, 1640, 24)
    checks_dense.check_rows_for_themselves(select_ops("triton", deterministic=True).linear, case, torch.float16, "cpu", monkeypatch)
    checks_dense.check_rows_for_themselves(tiled_triton.product, case, torch.float32, "cpu", monkeypatch)
