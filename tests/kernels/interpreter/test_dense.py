"""Products by dense matrices and the fused ops of a decode step on Triton's interpreter: the tiny cases, the small ones in the long run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from kernels.linear import cases as linear_cases
from kernels.linear import narrow_triton, tiled_triton
from kernels.ops import select_ops
from tests.kernels import checks_dense
from tests.kernels.interpreter.test_on_interpreter import DTYPES, sized


@pytest.mark.parametrize("case", sized([case for case in linear_cases.DENSE_CASES if case.num_rows <= 16]))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow(case: linear_cases.DenseCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    checks_dense.check_product(narrow_triton, case, dtype, "cpu", monkeypatch)


@pytest.mark.parametrize("case", sized(linear_cases.DENSE_CASES))
def test_tiled(case: linear_cases.DenseCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dtype a case, in turn."""
    checks_dense.check_product(tiled_triton, case, DTYPES[linear_cases.DENSE_CASES.index(case) % 3], "cpu", monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_residual(dtype: torch.dtype) -> None:
    checks_dense.check_added(dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", sized(linear_cases.LAYER_CASES))
def test_fused(case: linear_cases.LayerCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    checks_dense.check_qkv(case, dtype, "cpu", monkeypatch)
    monkeypatch.undo()
    checks_dense.check_mlp(case, dtype, "cpu", monkeypatch)


@pytest.mark.parametrize("case", sized(linear_cases.LAYER_CASES))
def test_the_back_end_fuses_a_layer(case: linear_cases.LayerCase) -> None:
    checks_dense.check_layer(case, "cpu")


def test_a_row_does_not_know_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy picks the order of its sums by shape, which in float64 no longer shows; what is left is the order the kernels choose."""

    def wide_dot(self: Any, a: Any, b: Any, c: Any, *rest: Any) -> Any:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + c.data
        return interpreter.TensorHandle(product.astype(np.float32), c.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", wide_dot)
    case = linear_cases.DenseCase("", "two chunks, the second ragged", 1, 1100, 40)
    checks_dense.check_rows_for_themselves(select_ops("triton", deterministic=True).linear, case, torch.float16, "cpu", monkeypatch)
    checks_dense.check_rows_for_themselves(tiled_triton.product, case, torch.float32, "cpu", monkeypatch)
