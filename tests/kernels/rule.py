"""How close a kernel must come: its error against float64 is at most twice that of plain PyTorch in the kernel's own dtype.

Also guarded memory, which shows a write outside an output. No case and no kernel here. Called by the kernel tests, on the
interpreter and on a GPU.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

CANARY = 77
"""Held exactly by every dtype that a kernel writes, int8 among them."""
GUARD = 64
"""Elements before and behind an output that must keep the canary."""
FLOOR = 4 * torch.finfo(torch.float32).eps
"""Relative to the largest exact value: four roundings of a float32 sum, for cases in which plain PyTorch happens to be exact."""


def assert_earned(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """got and plain share a dtype and lie anywhere; exact is float64 and computed from the same rounded inputs."""
    assert got.dtype == plain.dtype
    assert got.shape == plain.shape == exact.shape
    got, plain, exact = got.detach().cpu().double(), plain.detach().cpu().double(), exact.detach().cpu()
    assert exact.dtype == torch.float64
    assert bool(got.isfinite().all()), "the kernel gave NaN or infinity"
    allowed = 2 * float((plain - exact).abs().max()) + FLOOR * float(exact.abs().max())
    error = float((got - exact).abs().max())
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    """(a contiguous tensor of canaries, the memory that also holds GUARD canaries on both sides of it)."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 2 * GUARD,), CANARY, dtype=dtype, device=device)
    return memory[GUARD : GUARD + size].view(shape), memory


class GuardedTorch:
    """Stands in for `torch` in a kernel's module: all it allocates is guarded. Everything else is torch's own."""

    def __init__(self) -> None:
        self.memories: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        sizes = (shape[0],) if len(shape) == 1 and isinstance(shape[0], int) else shape[0]
        tensor, memory = guarded(tuple(sizes), dtype, device)
        self.memories.append(memory)
        return tensor

    def empty_like(self, x: Tensor) -> Tensor:
        return self.empty(tuple(x.shape), dtype=x.dtype, device=x.device)

    def check(self) -> None:
        """Fails when a kernel wrote outside what it was given, or when nothing was guarded at all."""
        assert self.memories, "the module allocated nothing"
        for memory in self.memories:
            assert_guards_whole(memory)


def guard_module(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> GuardedTorch:
    guards = GuardedTorch()
    monkeypatch.setattr(module, "torch", guards)
    return guards


def assert_guards_whole(memory: Tensor) -> None:
    assert bool((memory[:GUARD] == CANARY).all()), "a kernel wrote before its output"
    assert bool((memory[-GUARD:] == CANARY).all()), "a kernel wrote behind its output"
