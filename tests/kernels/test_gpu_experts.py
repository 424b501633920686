"""The kernels of experts on the device: every case but those meant for timing, tokens alone and in company, a captured graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.experts import cases, reference
from kernels.ops import Int8Weight
from tests.kernels.checks_experts import check_experts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FITTING = [pytest.param(case, id=case.name) for case in cases.CASES if case.size != "bench"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FITTING)
def test_experts(case: cases.ExpertsCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check_experts(case, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize("is_int8", [False, True], ids=["dense", "int8"])
def test_a_token_alone_equals_it_in_any_step_of_decoding(is_int8: bool) -> None:
    """At the width of a real model, and up to as many tokens as the tiles of decoding take."""
    from kernels.experts import triton

    x, weights, activation = cases.build(cases.ExpertsCase("", "", 256, 32, 8, 2048, 768, is_int8=is_int8), torch.bfloat16, "cuda")
    together = triton.experts(x, weights, activation)
    for count in (1, 3, 64, 255):
        assert torch.equal(triton.experts(x[:count], weights, activation), together[:count])
    assert torch.equal(triton.experts(x[200:], weights, activation), together[200:])


@pytest.mark.parametrize("is_int8", [False, True], ids=["dense", "int8"])
def test_one_tiling_for_steps_of_every_size(is_int8: bool) -> None:
    from kernels.experts import triton
    from kernels.linear.triton import linear

    case = cases.ExpertsCase("", "", 1500, 16, 4, 512, 384, is_int8=is_int8)
    x, weights, activation = cases.build(case, torch.bfloat16, "cuda")
    experts = triton.deterministic_experts(linear)
    together = experts(x, weights, activation)
    for count in (1, 64, 300):
        assert torch.equal(experts(x[:count], weights, activation), together[:count])


@pytest.mark.parametrize("num_tokens", [1, 16, 64])
def test_a_graph_is_right_for_other_tokens_than_it_was_captured_with(num_tokens: int) -> None:
    """How many tokens an expert gets, and so which tiles are needed, is read from the device."""
    from kernels.experts import triton

    case = cases.ExpertsCase("", "", num_tokens, 16, 4, 256, 128, shared=64)
    x, weights, activation = cases.build(case, torch.bfloat16, "cuda")
    others = torch.randn_like(x) * 2
    expected = triton.experts(others, weights, activation)
    static = torch.full_like(x, float("nan"))  # a row of padding may hold anything
    triton.experts(static, weights, activation)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = triton.experts(static, weights, activation)
    graph.replay()
    static.copy_(others)
    graph.replay()
    assert torch.equal(got, expected)


def test_offsets_past_two_to_the_31() -> None:
    """Matrices of more numbers than an int32 counts: the last expert's are found."""
    from kernels.experts import triton

    count, width, hidden = 40, 4096, 8192
    weights = cases.build(cases.ExpertsCase("", "", 1, count, 1, width, 64), torch.bfloat16, "cuda")[1]
    gate_up = torch.randint(-9, 10, (count * 2 * hidden, width), dtype=torch.int8, device="cuda")
    down = torch.randint(-9, 10, (count * width, hidden), dtype=torch.int8, device="cuda")
    scales = [torch.full((len(matrix),), 1e-2, device="cuda") for matrix in (gate_up, down)]
    router = torch.zeros_like(weights.router)
    router[-1] = 1.0
    weights = replace(
        weights,
        router=router,
        gate_up=Int8Weight(len(gate_up), width, gate_up, scales[0]),
        down=Int8Weight(len(down), hidden, down, scales[1]),
    )
    x = torch.rand(3, width, device="cuda").bfloat16()
    last = replace(
        weights,
        router=router[-1:],
        num_experts=1,
        gate_up=Int8Weight(2 * hidden, width, gate_up[-2 * hidden :], scales[0][-2 * hidden :]),
        down=Int8Weight(width, hidden, down[-width:], scales[1][-width:]),
    )
    assert gate_up.numel() > 2**31
    assert float(triton.experts(x, weights, "silu").std()) > 2, "else the tolerance would hide everything"
    torch.testing.assert_close(triton.experts(x, weights, "silu"), reference.experts(x, last, "silu"), rtol=2e-2, atol=0.2)
