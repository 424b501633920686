"""Processes that train together: sums, means and weights are equal in all of them, and a resumed run of two ends as one that was not."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from service.errors import StartupError
from service.model.vq import VQTokenizer
from tests.training.test_picture import SETTINGS, TINY, held_out, scenes
from training.loop import Schedule, run
from training.picture.codebook import DEAD_STEPS, MovingCodebook
from training.picture.stage import ReconstructionStage
from training.ranks import Rank, run_ranks


def test_one_rank_runs_here() -> None:
    seen: list[Rank] = []
    run_ranks(1, seen.append)
    assert seen == [Rank(0, 1)]
    alone = torch.tensor([3.0])
    seen[0].sum([alone])
    assert alone.item() == 3.0
    assert seen[0].agreed(2.5) == 2.5
    assert seen[0].is_first


def _share(folder: Path, rank: Rank) -> None:
    one, other = torch.full((2, 3), float(rank.index + 1)), torch.full((4,), 10.0 * (rank.index + 1))
    rank.sum([one, other])
    weight = torch.nn.Parameter(torch.zeros(5))
    weight.grad = torch.arange(5.0) * (rank.index + 1)
    rest = torch.nn.Parameter(torch.zeros(1))
    rank.average_gradients([weight, rest])
    torch.manual_seed(rank.index)
    table = F.normalize(torch.arange(12.0).view(6, 2) + 1, dim=-1)
    book = MovingCodebook(6)
    restarts = 0
    for _ in range(DEAD_STEPS + 1):
        latents = F.normalize(torch.randn(8, 2), dim=-1)
        restarts += book.update(table, latents, torch.randint(3, (8,)), rank)
    found = {
        "one": one,
        "other": other,
        "gradient": weight.grad,
        "agreed": torch.tensor(rank.agreed(0.1 * (rank.index + 1))),
        "table": table,
        "idle": book.idle,
        "restarts": torch.tensor(restarts),
        "threads": torch.tensor(torch.get_num_threads()),
    }
    torch.save(found, folder / f"{rank.index}.pt")


def test_two_ranks_share_sums_gradients_and_codebooks(tmp_path: Path) -> None:
    run_ranks(2, partial(_share, tmp_path))
    found = [torch.load(tmp_path / f"{index}.pt", weights_only=True) for index in range(2)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert torch.equal(found[0]["one"], torch.full((2, 3), 3.0))
    assert torch.equal(found[0]["other"], torch.full((4,), 30.0))
    assert torch.equal(found[0]["gradient"], torch.arange(5.0) * 1.5)
    assert found[0]["agreed"].item() == pytest.approx(0.1)
    assert found[0]["restarts"].item() == 3
    assert torch.allclose(found[0]["table"].norm(dim=-1), torch.ones(6), atol=1e-6)


def _fail(rank: Rank) -> None:
    if rank.index == 1:
        raise ValueError("the second gave up")


@pytest.mark.long
def test_what_a_rank_raises_is_told() -> None:
    with pytest.raises(Exception, match="the second gave up"):
        run_ranks(2, _fail)


def _refuse(rank: Rank) -> None:
    raise StartupError(f"there is no package for rank {rank.index}")


@pytest.mark.long
def test_a_startup_error_of_a_rank_is_one_here() -> None:
    with pytest.raises(StartupError, match=r"^there is no package for rank [01]$"):
        run_ranks(2, _refuse)


def _train(folder: Path, stop_at: int | None, rank: Rank) -> None:
    torch.manual_seed(0)
    stage = ReconstructionStage(VQTokenizer(TINY), scenes, held_out(), SETTINGS, rank, 0)
    step_of = stage.step

    def step(step: int) -> dict[str, float]:
        if step == stop_at:
            raise RuntimeError("interrupted")
        return dict(step_of(step))

    stage.step = step  # type: ignore[method-assign]
    run(stage, Schedule(steps=26, warmup_steps=3, evaluate_every=13, save_every=5), folder, rank)
    np.savez(folder / f"{rank.index}.npz", **{name: tensor.numpy() for name, tensor in stage.module.state_dict().items()})


@pytest.mark.long
def test_two_ranks_resume_to_the_same_weights(tmp_path: Path) -> None:
    run_ranks(2, partial(_train, tmp_path / "whole", None))
    with pytest.raises(Exception, match="interrupted"):
        run_ranks(2, partial(_train, tmp_path / "parts", 18))
    run_ranks(2, partial(_train, tmp_path / "parts", None))
    found = [dict(np.load(tmp_path / name / f"{index}.npz")) for name in ("whole", "parts") for index in range(2)]
    assert all(np.array_equal(other[name], array) for other in found[1:] for name, array in found[0].items())
