"""Packed rows, batches made by other processes, codes found later: all give what the plain way gives."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels.ops import AttentionSpec, Neighbourhood
from kernels.training_ops import visible, whole_documents
from tests.training.test_language import CONFIG, PICTURES, documents
from training.ahead import Ahead, num_workers
from training.decoder import fresh_decoder
from training.language import Elsewhere, LanguageSettings, LanguageStage, target_nats
from training.ranks import Rank
from training.stream.batch import Batch, batches, packed
from training.stream.document import CodesLater, Document, is_code, with_codes

ROW = 160
CPU = torch.device("cpu")


def some(count: int) -> list[Document]:
    random = np.random.default_rng(5)
    return [*documents(random, count), *documents(random, count // 2, has_codes=False)]


def nats(batch: Batch) -> list[float]:
    model = fresh_decoder(CONFIG, 0)
    arrays = (batch.read, batch.say, batch.counts)
    optional = (None if each is None else torch.from_numpy(each) for each in (batch.grid_start, batch.document_start))
    with torch.no_grad():
        found: list[float] = target_nats(model, *(torch.from_numpy(each) for each in arrays), *optional).tolist()
    return found


def test_documents_of_one_row_do_not_see_each_other() -> None:
    given = some(9)
    together = packed(given, PICTURES, 0, ROW)
    assert len(together.read) < len(given), "some share a row, or nothing is tested"
    alone = [loss for batch in batches(given, PICTURES, 0) for loss in nats(batch)]
    assert sorted(nats(together)) == pytest.approx(sorted(alone), abs=2e-5)


def test_the_mask_of_a_row_is_that_of_each_document() -> None:
    spec = AttentionSpec(1.0, window=9, sink=3, neighbourhood=Neighbourhood(PICTURES.columns, 1, 2))
    given = some(4)
    row = packed(given, PICTURES, 0, 1024)
    assert row.document_start is not None
    assert row.grid_start is not None
    assert len(row.read) == 1
    begins = torch.from_numpy(row.document_start)
    seen = visible(whole_documents(1, 1024, torch.from_numpy(row.grid_start).flatten().int(), document_start_UL=begins), spec)[0]
    expected = torch.zeros_like(seen)
    at = 0
    for each in sorted(given, key=lambda each: -len(each.ids)):
        (alone,) = batches([each], PICTURES, 0)
        size = alone.read.shape[1]
        grid = None if alone.grid_start is None else torch.from_numpy(alone.grid_start).flatten().int()
        expected[at : at + size, at : at + size] = visible(whole_documents(1, size, grid), spec)[0]
        at += size
    assert torch.equal(seen[:at], expected[:at])
    assert seen.diagonal().all(), "padding sees itself, or its softmax is no number"


def test_a_document_longer_than_a_row_is_cut() -> None:
    batch = packed([Document("x", np.arange(20, 60), np.ones(40, dtype=np.bool_))], PICTURES, 0, 16)
    assert batch.read.tolist() == [list(range(20, 36))]
    assert batch.say[0, -1] == 36


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_steps_come_in_turn_from_wherever_they_are_made(workers: int) -> None:
    ahead = Ahead(lambda step: (step, os.getpid()), workers)
    found = [ahead(step) for step in (*range(3, 9), 2, 3)]
    assert [step for step, _ in found] == [3, 4, 5, 6, 7, 8, 2, 3]
    assert all((process == os.getpid()) == (workers == 0) for _, process in found)


def test_a_cpu_that_trains_makes_its_own_batches() -> None:
    assert num_workers(CPU, 1) == 0
    assert num_workers(torch.device("cuda"), 1) >= 1


def test_codes_found_later_are_those_found_at_once() -> None:
    later = CodesLater((PICTURES.rows, PICTURES.columns))
    random = np.random.default_rng(3)
    pictures = random.integers(256, size=(5, 4, 4, 3)).astype(np.uint8)
    codes = random.integers(PICTURES.num_codes, size=(5, PICTURES.rows, PICTURES.columns))
    numbers = np.concatenate([later(pictures[:2]), later(pictures[2:])])
    assert is_code(numbers, PICTURES).all()
    assert not is_code(np.arange(20, 30), PICTURES).any()
    kept = later.taken()
    assert kept is not None
    assert np.array_equal(kept, pictures)
    assert later.taken() is None
    ids = with_codes(numbers, codes.ravel() + PICTURES.first_code)
    assert np.array_equal(ids, codes + PICTURES.first_code)


def test_a_stage_learns_the_same_from_batches_made_elsewhere() -> None:
    """One update from packed rows whose codes are found late is the update from plain batches, but for rounding."""
    codes = np.random.default_rng(1).integers(PICTURES.num_codes, size=(4, PICTURES.num_places))
    later = CodesLater((PICTURES.rows, PICTURES.columns))

    def thrown(is_known: bool) -> list[Document]:
        found = []
        for index, own in enumerate(codes):
            ids = own + PICTURES.first_code if is_known else later(np.full((1, 1, 1, 3), index, dtype=np.uint8)).ravel()
            whole = np.array([1, 3, 40 + index, 4, 5, *ids, 7, 2])
            found.append(Document("x", whole, np.arange(len(whole)) > 3))
        return found

    def encode(pictures: NDArray[np.uint8]) -> NDArray[np.int64]:
        return codes[pictures[:, 0, 0, 0]].reshape(-1, PICTURES.rows, PICTURES.columns)

    def taught(is_known: bool) -> list[torch.Tensor]:
        elsewhere = None if is_known else Elsewhere(0, later, encode)
        settings = LanguageSettings(noise=0.0, precision="fp32", learning_rate=1e-4)
        stage = LanguageStage(
            "x", fresh_decoder(CONFIG, 0), lambda *_: thrown(is_known), {}, settings, elsewhere=elsewhere, pad_id=0, rank=Rank(), seed=0
        )
        figures = stage.step(0)
        assert figures["code"] > 0
        assert figures["text"] > 0
        return [each.detach() for each in stage.learned]

    for one, other in zip(taught(True), taught(False), strict=True):
        assert torch.allclose(one, other, atol=2e-5)


@pytest.mark.gpu
def test_attention_of_a_gpu_is_that_of_a_cpu() -> None:
    """PyTorch's fused kernel with a mask against the plain formula."""
    batch = packed(some(9), PICTURES, 0, ROW)
    model = fresh_decoder(CONFIG, 0, "cuda")
    arrays = [torch.from_numpy(each).cuda() for each in (batch.read, batch.say, batch.counts)]
    optional = [None if each is None else torch.from_numpy(each).cuda() for each in (batch.grid_start, batch.document_start)]
    with torch.no_grad():
        found = target_nats(model, *arrays, *optional).tolist()
    assert found == pytest.approx(nats(batch), abs=1e-3)
