"""What the Triton kernels of experts must do, case by case and on any device: earned tolerance, whole guards, tokens that don't meet.

Shared by the run on the interpreter, the run on a GPU and `bench.gpu`, so that all ask for the same.
"""

from __future__ import annotations

import pytest
import torch

from kernels.experts import cases, reference
from tests.kernels.rule import assert_earned, guard_module


def check_experts(case: cases.ExpertsCase, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.experts import triton

    x, weights, activation = cases.build(case, dtype, device)
    guards = guard_module(monkeypatch, triton)
    got = triton.experts(x, weights, activation)
    guards.check()
    exact = reference.experts(x.double(), cases.in_double(weights), activation)
    plain = reference.experts(x, weights, activation)
    if case.is_int8:  # between the products numbers become whole ones, and one that lies half-way may fall to either side
        step = float(exact.abs().max()) / 127
        assert float((got - exact).abs().max()) <= 2 * float((plain - exact).abs().max()) + step
    else:
        assert_earned(got, plain, exact)
    has_fixed_products = case.is_int8 or not case.shared  # a dense shared expert is the vendor's products
    if has_fixed_products and triton.tiling_of(len(x), case.top_k, case.num_experts) is triton.DECODE:
        for token in {0, len(x) - 1}:
            assert torch.equal(triton.experts(x[token : token + 1], weights, activation)[0], got[token]), "a token's company shows"
