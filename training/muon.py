"""Muon: momentum whose direction is orthogonalised, for matrices. PyTorch's own class, but for two things that cost a third of a step here.

PyTorch orthogonalises in bfloat16, which a CPU without such instructions has to emulate, and in every process anew. Here it is float32
where bfloat16 has no instructions, and each process does its share of the matrices. Called by the language stage.
Source: Jordan et al. 2024 (Muon), coefficients included; Liu et al. 2025, section 2.2, for the scale of an update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.loop import has_fast_bf16
from training.ranks import Rank

_A, _B, _C = 3.4445, -4.7750, 2.0315
_ROUNDS = 5
_MATCH_ADAMW = 0.2
"""Root mean square of AdamW's usual updates, so that both take the same learning rate."""


class Muon(Optimizer):
    """Learns matrices [rows, columns]; other tensors need another optimiser."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float, rank: Rank, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.rank = rank

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update. Mutates: the matrices and their momentum, which are equal in all processes after."""
        for group in self.param_groups:
            matrices = [each for each in group["params"] if each.grad is not None]
            updates = [self._direction(each, group["momentum"]) for each in matrices]
            own = _owners([each.numel() * min(each.shape) for each in matrices], self.rank.count)
            updates = [
                orthogonal(each) if owner == self.rank.index else torch.zeros_like(each) for each, owner in zip(updates, own, strict=True)
            ]
            self.rank.sum(updates)
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * _MATCH_ADAMW * math.sqrt(max(matrix.shape)))
        return None

    def _direction(self, matrix: Tensor, momentum: float) -> Tensor:
        """Nesterov's. Mutates: the momentum of this matrix."""
        state: dict[str, Any] = self.state[matrix]
        gradient = matrix.grad
        assert gradient is not None
        moving = state.setdefault("momentum", torch.zeros_like(gradient)).lerp_(gradient, 1 - momentum)
        return gradient.lerp(moving, momentum)


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly U Vᵀ of a matrix's singular value decomposition: singular values come out between 0.7 and 1.2. Newton and Schulz's iteration,
    with a polynomial of degree 5."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = (x / x.norm().clamp(min=1e-7)).to(torch.bfloat16 if has_fast_bf16(matrix.device) else torch.float32)
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x.T if is_tall else x).to(matrix.dtype).contiguous()


def _owners(costs: Sequence[int], count: int) -> list[int]:
    """Which process does each matrix: the dearest first, each to whom has least to do."""
    loads, owners = [0] * count, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners
