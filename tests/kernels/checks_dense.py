"""What products by dense matrices and the fused ops over them must do, on any device: earned tolerance, whole guards, rows for themselves.

Shared by the run on the interpreter and the run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.linear import cases as linear_cases
from kernels.ops import LayerWeights, PagedKV, select_ops
from tests.kernels.rule import assert_earned, assert_guards_whole, guard_module, guarded


def check_product(
    module: ModuleType, case: linear_cases.DenseCase, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = linear_cases.build_dense(case, dtype, device)
    guards = guard_module(monkeypatch, module)
    got = module.product(x, weight)
    guards.check()
    assert_earned(got, torch.nn.functional.linear(x, weight), x.double() @ weight.double().T)


def check_rows_for_themselves(
    product: Callable[[Tensor, Tensor], Tensor], case: linear_cases.DenseCase, dtype: torch.dtype, device: str, patch: pytest.MonkeyPatch
) -> None:
    """A row alone, among two others, in one more than sixteen and in more than a tile: the same bits, whoever takes the chunks."""
    from kernels.linear import tiled_triton

    x, weight = linear_cases.build_dense(replace(case, num_rows=70), dtype, device)
    alone = product(x[2:3], weight)
    for busy in (132, 0):
        patch.setattr(tiled_triton, "BUSY", busy)
        for num_rows in (3, 17, 70):
            assert torch.equal(product(x[:num_rows], weight)[2:3], alone), f"a row's bits change among {num_rows}"
    assert tiled_triton.chunk_of(case.out_features, case.in_features) < case.in_features, "a case of one chunk shows nothing"


def check_added(dtype: torch.dtype, device: str) -> None:
    """Bias and residual are added before the one rounding, and the residual is where the sum is."""
    from kernels.linear import narrow_triton

    x, weight = linear_cases.build_dense(linear_cases.DenseCase("", "", 5, 200, 70), dtype, device)
    bias, residual = torch.randn(70, device=device).to(dtype), torch.randn(5, 70, device=device).to(dtype)
    exact = residual.double() + x.double() @ weight.double().T + bias.double()
    plain = residual + torch.nn.functional.linear(x, weight, bias)
    mine, memory = guarded((5, 70), dtype, device)
    mine.copy_(residual)
    got = narrow_triton.product(x, weight, bias, mine)
    assert got.data_ptr() == mine.data_ptr()
    assert_guards_whole(memory)
    assert_earned(got, plain, exact)


def check_qkv(case: linear_cases.LayerCase, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels themselves, whatever dtype the back end would give them: queries, residual, the pool and what must not be touched."""
    from kernels.kv_write import triton as kv_write
    from kernels.linear import fused_triton

    x, residual, weights, positions, kv = linear_cases.build_layer(case, dtype, device)
    pool, memory = guarded((4, 2, *kv.keys.shape[1:]), kv.keys.dtype, device)
    mine = PagedKV(pool[:, 0], pool[:, 1], kv.batch)
    plain_pool, exact_pool = pool.clone(), pool.double()
    given = None if residual is None else residual.clone()
    guards = guard_module(monkeypatch, fused_triton)
    if fused_triton.can_write(weights, mine):
        got, total = fused_triton.normed_qkv(x, residual, weights, positions, mine)
    else:
        rows, total = fused_triton.normed_product(x, residual, weights)
        got = kv_write.kv_write(rows, weights, positions, mine)
    guards.check()
    assert_guards_whole(memory)
    plain, plain_total = select_ops("reference").qkv(x, residual, weights, positions, PagedKV(plain_pool[:, 0], plain_pool[:, 1], kv.batch))
    assert torch.equal(total, plain_total)
    assert given is None or torch.equal(residual, given), "the residual that other programs still read was written"  # type: ignore[arg-type]
    exact, _ = select_ops("reference").qkv(
        plain_total.double(), None, widened(weights), positions, PagedKV(exact_pool[:, 0], exact_pool[:, 1], kv.batch)
    )
    assert_earned(got, plain, exact)
    is_written = torch.zeros(64, dtype=torch.bool, device=device)
    is_written[kv.batch.slots[kv.batch.slots >= 0]] = True
    by_place = pool.permute(0, 3, 1, 2, 4).flatten(0, 1)
    assert bool((by_place[~is_written] == 77).all()), "a slot that no token has was written"
    assert_earned(pool, plain_pool, exact_pool)


def check_gate_up(case: linear_cases.LayerCase, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.linear import fused_triton

    x, residual, weights, _, _ = linear_cases.build_layer(case, dtype, device)
    given = None if residual is None else residual.clone()
    guards = guard_module(monkeypatch, fused_triton)
    got, total = fused_triton.normed_gate_up(x, residual, weights)
    guards.check()
    assert torch.equal(total, x if residual is None else residual + x)
    assert given is None or torch.equal(residual, given), "the residual that other programs still read was written"  # type: ignore[arg-type]
    assert_earned(got, _hidden(total, weights), _hidden(total.double(), widened(weights)))


def _hidden(x: Tensor, weights: LayerWeights) -> Tensor:
    ops = select_ops("reference")
    normed, _ = ops.rms_norm(x, None, weights.mlp_norm, weights.spec.norm_eps)
    return ops.gated(ops.linear(normed, weights.gate_up), weights.spec.activation)


def check_layer(case: linear_cases.LayerCase, device: str) -> None:
    """qkv and out_mlp as the back end has them, in bfloat16, one behind the other, by the same rule."""
    x, residual, weights, positions, kv = linear_cases.build_layer(case, torch.bfloat16, device)
    y = torch.randn((case.num_rows, case.num_heads * case.head_width), device=device).to(torch.bfloat16)
    results = []
    for name, one in (("triton", weights), ("reference", weights), ("reference", widened(weights))):
        ops, wide = select_ops(name), one.qkv.dtype == torch.float64  # type: ignore[arg-type, union-attr]
        to = torch.float64 if wide else torch.bfloat16
        pool = torch.zeros((2, *kv.keys.shape), dtype=torch.float64 if wide else kv.keys.dtype, device=device)
        given = None if residual is None else residual.to(to, copy=True)
        q, total = ops.qkv(x.to(to), given, one, positions, PagedKV(pool[0], pool[1], kv.batch))
        results.append((q, pool, *ops.out_mlp(y.to(to), total.clone(), one)))
    for got, plain, exact in zip(*results, strict=True):
        assert_earned(got, plain, exact)


def widened(weights: LayerWeights) -> LayerWeights:
    names = ("attention_norm", "qkv", "out", "mlp_norm", "gate_up", "down", "qkv_bias", "q_norm", "k_norm", "out_norm", "down_norm")
    wide: dict[str, Any] = {name: None if getattr(weights, name) is None else getattr(weights, name).double() for name in names}
    return replace(weights, **wide)
