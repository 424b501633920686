"""The kernels of experts compiled ahead of time, as the wrapper would launch them; see test_compile.py."""

from __future__ import annotations

import pytest
import torch

from kernels.experts import cases, triton
from tests.kernels.launches import CHIPS, assert_fits, compile_launch, record

# Of one layer of few experts, but as wide as Qwen3-30B-A3B's: tiles follow the number of tokens and of experts, not the memory.
SHAPES = (
    cases.ExpertsCase("decode", "", 4, 8, 8, 2048, 768),
    cases.ExpertsCase("prompt", "", 260, 64, 8, 256, 256),
    cases.ExpertsCase("long_prompt", "", 260, 8, 8, 256, 256),
)
KERNELS = ["router_kernel", "route_kernel", "group_kernel", "gate_up_kernel", "down_kernel", "sum_kernel"]


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("is_int8", [False, True], ids=["dense", "int8"])
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.long] if case.name == "prompt" else []) for case in SHAPES]
)
def test_experts(case: cases.ExpertsCase, is_int8: bool, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights, activation = cases.build(case, torch.bfloat16)
    weights = cases.in_int8(weights) if is_int8 else weights
    monkeypatch.setattr(triton, "can_depend", lambda device: capability >= 90)
    launches = record(monkeypatch, triton, lambda: triton.experts(x, weights, activation))
    assert [launch.name for launch in launches if launch.name != "quantize_kernel"] == KERNELS
    for launch in launches:
        if case.name == "decode" or launch.name in ("gate_up_kernel", "down_kernel"):
            assert_fits(launch, capability, f"{case.name} {'int8' if is_int8 else 'dense'}")
        if launch.name in ("gate_up_kernel", "down_kernel"):
            ptx = compile_launch(launch, capability).ptx
            assert "cp.async.cg" in ptx, "loads must go past the registers, 16 bytes at once"
            assert ("griddepcontrol.wait" in ptx) == (capability >= 90)
            if capability == 90:
                assert ("mma.sync" if case.name == "decode" else "wgmma.mma_async") in ptx
