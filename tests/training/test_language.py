"""How the decoder learns: what is disturbed, what is weighed, how losses are added up over processes; and batches of bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.decoder import fresh_decoder
from training.language import LanguageSettings, LanguageStage, document_nats, nearest_codes
from training.loop import Schedule, run
from training.ranks import Rank, run_ranks
from training.recipe import read_recipe
from training.stream.batch import batches
from training.stream.document import Document

CONFIG = read_recipe("smoke").model_config()
assert CONFIG.pictures is not None
PICTURES = CONFIG.pictures


def documents(random: np.random.Generator, count: int, *, has_codes: bool = True) -> list[Document]:
    found = []
    for _ in range(count):
        codes = random.integers(PICTURES.first_code, PICTURES.first_code + PICTURES.num_codes, size=PICTURES.num_places)
        text = random.integers(20, 300, size=random.integers(3, 40))
        ids = np.array([1, 3, *text, 4, *([5, *codes, 7] if has_codes else [60, 61]), 2])
        found.append(Document("x", ids, np.arange(len(ids)) > len(text) + 2))
    return found


def thrown(has_codes: bool, random: np.random.Generator, tokens: int) -> Sequence[Document]:
    return documents(random, 3, has_codes=has_codes)


def stage_of(rank: Rank = Rank(), has_codes: bool = True, **settings: Any) -> LanguageStage:  # noqa: B008
    held_out = {"x": documents(np.random.default_rng(9), 4)}
    near = nearest_codes(F.normalize(torch.randn(PICTURES.num_codes, 4, generator=torch.Generator().manual_seed(0)), dim=-1))
    model = fresh_decoder(CONFIG, 0)
    return LanguageStage(
        "x", model, partial(thrown, has_codes), held_out, LanguageSettings(**settings), near=near, pad_id=0, rank=rank, seed=3
    )


def test_the_nearest_codes_are_those_of_the_smallest_angle() -> None:
    angles = torch.tensor([0.0, 0.1, 0.3, 3.0])
    found = nearest_codes(torch.stack((angles.cos(), angles.sin()), dim=-1), count=2)
    assert found.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]


def test_only_codes_of_the_answer_are_read_disturbed() -> None:
    stage = stage_of()
    prompted = documents(np.random.default_rng(1), 1)[0]
    codes = prompted.ids[prompted.ids >= PICTURES.first_code]
    ids = np.array([1, 3, 5, *codes, 7, 20, 4, 5, *codes, 7, 2])
    (batch,) = batches([Document("edit", ids, np.arange(len(ids)) > len(codes) + 5)], PICTURES, 0)
    read, counts = torch.from_numpy(batch.read), torch.from_numpy(batch.counts)
    torch.manual_seed(0)
    everything, some = stage._disturbed(read, counts, 1.0), stage._disturbed(read, counts, 0.3)
    own = torch.zeros_like(counts)
    start = len(codes) + 7
    own[0, start : start + len(codes)] = True
    assert torch.equal(everything != read, own)
    assert stage.near is not None
    near = stage.near[read[own] - PICTURES.first_code] + PICTURES.first_code
    assert (everything[own][:, None] == near).any(1).all()
    assert 0 < (some != read).sum() < own.sum()
    assert not (some != read)[~own].any()


def test_text_weighs_what_it_is_told_to() -> None:
    (batch,) = batches(documents(np.random.default_rng(2), 1), PICTURES, 0)
    losses, weights, is_code = stage_of(text_weight=3.0).losses(batch)
    assert weights.tolist() == [1.0 if code else 3.0 for code in is_code.tolist()]
    plain = stage_of().losses(batch)
    assert torch.equal(losses, plain[0])
    assert set(plain[1].tolist()) == {1.0}


def test_a_later_mix_takes_over_at_its_step() -> None:
    asked: list[str] = []

    def named(name: str, random: np.random.Generator, tokens: int) -> Sequence[Document]:
        asked.append(name)
        return documents(random, 1)

    own = LanguageSettings(noise=0.0)
    later = [(2, partial(named, "second")), (3, partial(named, "third"))]
    stage = LanguageStage("x", fresh_decoder(CONFIG, 0), partial(named, "first"), {}, own, later=later, pad_id=0, rank=Rank(), seed=0)
    for step in range(5):
        stage.step(step)
    assert asked == ["first", "first", "second", "third", "third"]


def test_batches_are_bounded_and_losses_are_not_touched_by_it() -> None:
    some = documents(np.random.default_rng(4), 9)
    whole, parts = list(batches(some, PICTURES, 0)), list(batches(some, PICTURES, 0, 250))
    assert len(parts) > len(whole)
    assert max(part.read.size for part in parts) <= 250
    assert sum(int(part.counts.sum()) for part in parts) == sum(int(each.is_target.sum()) for each in some)
    model = fresh_decoder(CONFIG, 0)
    alone = torch.cat([document_nats(model, [each], PICTURES, 0) for each in some])
    torch.testing.assert_close(document_nats(model, some, PICTURES, 0).sort().values, alone.sort().values)


def _learn(folder: Path, rank: Rank) -> None:
    """The second process never sees a code, so the vectors of the grid have no gradient there."""
    stage = stage_of(rank, has_codes=rank.is_first)
    run(stage, Schedule(steps=3, warmup_steps=1, evaluate_every=3), folder, rank, 3)
    torch.save(stage.module.state_dict(), folder / f"{rank.index}.pt")


def test_two_processes_hold_equal_weights_whatever_each_has_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(2, partial(_learn, tmp_path))
    one, other = (torch.load(tmp_path / f"{index}.pt", weights_only=True) for index in range(2))
    fresh = fresh_decoder(CONFIG, 0).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert not torch.equal(one["grid_rows"], fresh["grid_rows"])
