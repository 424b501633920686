"""Products by dense matrices and the fused ops of a decode step, compiled ahead of time: shared memory, registers, the instructions meant.

From Hopper on as dependent launches. sm_90 is in the ordinary run; sm_80 and sm_100 in the long one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from kernels.gated import triton as gated
from kernels.linear import cases, fused_triton, narrow_triton, tiled_triton
from kernels.norm import triton as norm
from tests.kernels.launches import CHIPS, Launch, assert_fits, compile_launch, record

SHAPES = {"head": (128_256, 2048), "gate_up": (16_384, 2048), "qkv": (6144, 4096), "down": (576, 1536)}
"""(out, in): one for each of the tilings."""
NAMES = [pytest.param(name, marks=() if name in ("head", "qkv") else pytest.mark.long) for name in SHAPES]
_LAYERS = (
    cases.LayerCase("llama", "", 1, 512, 32, 8, 64, 4096),
    cases.LayerCase("llama_16", "", 16, 512, 64, 8, 128, 16384),
    cases.LayerCase("smollm", "", 2, 576, 9, 3, 64, 1536, has_residual=False),
    cases.LayerCase("qwen", "", 8, 1024, 16, 8, 128, 3072, has_bias=True),
)
LAYERS = [pytest.param(case, id=case.name, marks=() if case.name == "llama_16" else pytest.mark.long) for case in _LAYERS]


@pytest.fixture
def launches_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Launch]]:
    """The launches of a call as a chip of that capability would get them."""

    def recorded(module: ModuleType, capability: int, call: Callable[[], object]) -> list[Launch]:
        with monkeypatch.context() as patch:
            patch.setattr(module, "can_depend", lambda device: capability >= 90)
            return record(patch, module, call)

    return recorded


def instruction(capability: int) -> str:
    return {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("name", NAMES)
def test_narrow(name: str, capability: int, launches_of: Any) -> None:
    """Loads must go past the registers, 16 bytes at once, and sums through the tensor cores."""
    x = torch.empty((16 if name == "qkv" else 1, SHAPES[name][1]), dtype=torch.bfloat16)
    weight = _weight(SHAPES[name])
    for launch in launches_of(narrow_triton, capability, lambda: narrow_triton.product(x, weight)):
        assert_fits(launch, capability, name)
        ptx = compile_launch(launch, capability).ptx
        assert "cp.async.cg" in ptx
        assert "mma.sync" in ptx
        assert ("griddepcontrol.wait" in ptx) == (capability >= 90)
        assert ("prefetch.global.L2" in ptx) == (capability >= 90)


@pytest.mark.long
@pytest.mark.parametrize("tiling", narrow_triton.CANDIDATES, ids=str)
def test_candidates(tiling: narrow_triton.Tiling, launches_of: Any) -> None:
    x, weight = torch.empty((16, 4096), dtype=torch.bfloat16), _weight((6144, 4096))
    (launch,) = launches_of(narrow_triton, 90, lambda: narrow_triton.product(x, weight, tiling=tiling))
    assert_fits(launch, 90, str(tiling))


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("num_rows", [16, 64, 500])
def test_tiled(num_rows: int, capability: int, launches_of: Any) -> None:
    """One instruction for all numbers of rows: only so are a row's bits the same at each."""
    x, weight = torch.empty((num_rows, 4096), dtype=torch.bfloat16), _weight((4096, 4096))
    launches = launches_of(tiled_triton, capability, lambda: tiled_triton.product(x, weight))
    assert [launch.name for launch in launches] == ["tiled_kernel", "merge_kernel"]
    for launch in launches:
        assert_fits(launch, capability, f"{num_rows} rows")
    assert instruction(capability) in compile_launch(launches[0], capability).ptx


@pytest.mark.long
def test_tiled_in_order(launches_of: Any) -> None:
    x, weight = torch.empty((2048, 4096), dtype=torch.bfloat16), _weight((4096, 4096))
    (launch,) = launches_of(tiled_triton, 90, lambda: tiled_triton.product(x, weight))
    assert launch.arguments["num_chunks"] > 1
    assert_fits(launch, 90, "in order")
    assert instruction(90) in compile_launch(launch, 90).ptx


@pytest.mark.long
@pytest.mark.parametrize("num_rows", [8, 500])
def test_tiled_float32(num_rows: int, launches_of: Any) -> None:
    x, weight = torch.empty(num_rows, 1024), torch.empty(3072, 1024)
    for launch in launches_of(tiled_triton, 90, lambda: tiled_triton.product(x, weight)):
        assert_fits(launch, 90, f"{num_rows} rows, float32")


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("case", LAYERS)
def test_fused(case: cases.LayerCase, capability: int, launches_of: Any) -> None:
    x, residual, weights, positions, kv = cases.build_layer(case, torch.bfloat16)
    write = fused_triton.normed_qkv if fused_triton.can_write(weights, kv) else None
    launches = launches_of(
        fused_triton,
        capability,
        lambda: (
            write(x, residual, weights, positions, kv) if write else fused_triton.normed_product(x, residual, weights),
            fused_triton.normed_gate_up(x, residual, weights),
        ),
    )
    assert [launch.name for launch in launches] == ["qkv_kernel" if write else "normed_kernel", "gate_up_kernel"]
    for launch in launches:
        assert_fits(launch, capability, case.name)


def test_norm_and_gated_wait(launches_of: Any) -> None:
    x, weight = torch.empty((2, 4096), dtype=torch.bfloat16), torch.empty(4096, dtype=torch.bfloat16)
    launches = launches_of(norm, 90, lambda: norm.rms_norm(x, x, weight, 1e-5)) + launches_of(gated, 90, lambda: gated.gated(x, "silu"))
    for launch in launches:
        assert launch.launch_pdl
        assert "griddepcontrol.wait" in compile_launch(launch, 90).ptx


def _weight(shape: tuple[int, int]) -> torch.Tensor:
    """A matrix of the shape that takes no memory until it is read, which nobody does."""
    return torch.empty(shape, dtype=torch.bfloat16)
