"""Muon here is PyTorch's Muon, up to the rounding that it avoids; and two processes, each doing its share, do what one does."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from training.muon import Muon, orthogonal
from training.ranks import Rank, run_ranks

SHAPES = ((12, 8), (8, 24), (8, 8), (40, 8))
RATE, DECAY = 0.02, 0.1


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (32, 32)])
def test_an_update_has_directions_of_equal_length(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(matrix)
    assert found.shape == matrix.shape
    assert found.is_contiguous()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3
    assert values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.cosine_similarity(found.flatten(), (u @ vh).flatten(), dim=0) > 0.97


def _matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def _taught(matrices: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        for each in matrices:
            each.grad = torch.randn(each.shape, generator=generator)
        optimizer.step()
    return matrices


def test_it_learns_as_torchs_own() -> None:
    own, theirs = _matrices(), _matrices()
    _taught(own, Muon(own, RATE, DECAY, Rank()))
    _taught(theirs, torch.optim.Muon(theirs, lr=RATE, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    for one, other, fresh in zip(own, theirs, _matrices(), strict=True):
        assert not torch.allclose(one, fresh, atol=1e-3)
        moved, theirs_moved = (one - fresh).flatten(), (other - fresh).flatten()
        assert torch.cosine_similarity(moved, theirs_moved, dim=0) > 0.99  # torch's are bfloat16
        assert (moved.norm() / theirs_moved.norm()).item() == pytest.approx(1.0, abs=0.02)


def test_a_matrix_without_a_gradient_stays_as_it_is() -> None:
    matrices = _matrices()
    matrices[0].grad = torch.ones_like(matrices[0])
    Muon(matrices, RATE, DECAY, Rank()).step()
    assert not torch.equal(matrices[0], _matrices()[0])
    assert all(torch.equal(one, other) for one, other in zip(matrices[1:], _matrices()[1:], strict=True))


def _rank(folder: Path, rank: Rank) -> None:
    matrices = _matrices()
    torch.save([each.detach() for each in _taught(matrices, Muon(matrices, RATE, DECAY, rank))], folder / f"{rank.index}.pt")


@pytest.mark.long
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    run_ranks(2, partial(_rank, tmp_path))
    alone = _matrices()
    _taught(alone, Muon(alone, RATE, DECAY, Rank()))
    for index in range(2):
        found = torch.load(tmp_path / f"{index}.pt", weights_only=True)
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
