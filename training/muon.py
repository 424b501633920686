"""Muon: momentum whose direction is orthogonalised, for matrices. PyTorch's own class, but for two things that cost a third of a step here.

PyTorch orthogonalises in bfloat16, which a CPU without such instructions has to emulate, and in every process anew. Here it is float32
where bfloat16 has no instructions, and each process does its share of the matrices. Called by the language stage.
Source: Jordan et al. 2024 (Muon), coefficients included; Liu et al. 2025, section 2.2, for the scale of an update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast, overload

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
            updates = self._directions(matrices, group["momentum"])
            own = _owners([each.numel() * min(each.shape) for each in matrices], self.rank.count)
            mine = [index for index, owner in enumerate(own) if owner == self.rank.index]
            orthogonalised = dict(zip(mine, orthogonal_all([updates[index] for index in mine]), strict=True))
            updates = [orthogonalised[index] if index in orthogonalised else torch.zeros_like(each) for index, each in enumerate(updates)]
            self.rank.sum(updates)
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.add_(update, alpha=-group["lr"] * _MATCH_ADAMW * math.sqrt(max(matrix.shape)))
        return None

    def _directions(self, matrices: Sequence[Tensor], momentum: float) -> list[Tensor]:
        """Nesterov's. Mutates: the momenta of these matrices."""
        gradients = [cast(Tensor, each.grad) for each in matrices]
        moving = [self._momentum(each) for each in matrices]
        torch._foreach_lerp_(moving, gradients, 1 - momentum)
        return list(torch._foreach_lerp(gradients, moving, momentum))

    def _momentum(self, matrix: Tensor) -> Tensor:
        state: dict[str, Any] = self.state[matrix]
        return cast(Tensor, state.setdefault("momentum", torch.zeros_like(matrix)))


def orthogonal_all(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonal` of each; those of one shape are computed together."""
    found: dict[int, Tensor] = {}
    for shape in dict.fromkeys(each.shape for each in matrices):
        alike = [index for index, each in enumerate(matrices) if each.shape == shape]
        found |= zip(alike, orthogonal(torch.stack([matrices[index] for index in alike])), strict=True)
    return [found[index] for index in range(len(matrices))]


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly U Vᵀ of the singular value decomposition of each matrix [..., rows, columns]: singular values come out between 0.7 and 1.2.
    Newton and Schulz's iteration, with a polynomial of degree 5."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    x = x.to(torch.bfloat16 if has_fast_bf16(matrices.device) else torch.float32)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    wide: Tensor = (x.mT if is_tall else x).to(matrices.dtype)
    return wide.contiguous()


def _owners(costs: Sequence[int], count: int) -> list[int]:
    """Which process does each matrix: the dearest first, each to whom has least to do."""
    loads, owners = [0] * count, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners
