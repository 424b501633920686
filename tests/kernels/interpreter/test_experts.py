"""The kernels of experts on Triton's interpreter: the tiny cases, and the small ones in the long run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.experts import cases, triton
from kernels.linear.triton import linear
from kernels.ops import AttentionSpec, LayerSpec, LayerWeights, select_ops
from kernels.triton_ops import triton_ops
from tests.kernels.checks_experts import check_experts
from tests.kernels.interpreter.test_on_interpreter import DTYPES, sized


@pytest.mark.parametrize("case", sized(cases.CASES))
def test_experts(case: cases.ExpertsCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dtype a case, in turn."""
    check_experts(case, DTYPES[cases.CASES.index(case) % 3], "cpu", monkeypatch)


@pytest.mark.parametrize("name", ["crowded", pytest.param("ties", marks=pytest.mark.long)])
def test_more_entries_than_are_grouped_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "GROUP_BLOCK", 16)
    case = next(case for case in cases.CASES if case.name == name)
    assert case.num_tokens * case.top_k > 16
    check_experts(case, torch.float32, "cpu", monkeypatch)


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_a_row_of_garbage_disturbs_nobody() -> None:
    """A graph's rows of padding hold what earlier steps left there."""
    x, weights, activation = cases.build(cases.ExpertsCase("", "", 4, 8, 2, 64, 32), torch.float32)
    expected = triton.experts(x, weights, activation)
    x[1] = float("nan")
    got = triton.experts(x, weights, activation)
    for row in (0, 2, 3):
        assert torch.equal(got[row], expected[row])


def test_one_tiling_for_steps_of_every_size() -> None:
    x, weights, activation = cases.build(cases.ExpertsCase("", "", 70, 3, 1, 48, 32), torch.float32)
    experts = triton.deterministic_experts(linear)
    together = experts(x, weights, activation)
    torch.testing.assert_close(together, triton.experts(x, weights, activation))
    assert torch.equal(experts(x[:3], weights, activation), together[:3])


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_a_layer_with_experts_is_not_taken_for_one_block(is_deterministic: bool) -> None:
    """One expert has matrices of the shapes that a dense layer's have, and a shared one that a fused layer would leave out."""
    x, weights, activation = cases.build(cases.ExpertsCase("", "", 3, 1, 1, 64, 32, shared=48), torch.bfloat16)
    residual, out = torch.randn_like(x), torch.randn(64, 64).bfloat16() / 8
    layer = LayerWeights(
        spec=LayerSpec(4, 2, 16, AttentionSpec(0.25), 1e-5, activation),
        attention_norm=torch.ones(64).bfloat16(),
        qkv=out,
        out=out,
        mlp_norm=torch.ones(64).bfloat16(),
        gate_up=weights.gate_up,
        down=weights.down,
        rotary=torch.zeros(4, 2, 8),
        experts=weights,
    )
    got = triton_ops(is_deterministic).out_mlp(x, residual.clone(), layer)[0]
    want = select_ops("reference").out_mlp(x, residual.clone(), layer)[0]
    alone = select_ops("reference").out_mlp(x, residual.clone(), replace(layer, experts=None))[0]
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    assert float((want - alone).abs().max()) > 0.2
