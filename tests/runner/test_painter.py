"""The painter: what it makes of pixels and codes is the image tokenizer's own, whatever else is in its batch; a fault is nobody else's."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from service.model.vq import VQConfig, VQTokenizer
from service.runner.image_tokenizer import Painter
from service.scheduling.plan import PictureResult, PictureWork
from service.vocabulary import PictureIds

PICTURES = PictureIds(first_code=100, num_codes=32, rows=3, columns=5, begin_id=1, frame_id=2, end_id=3)
CONFIG = VQConfig(num_codes=32, code_width=4, channels=(32, 64, 64), latent_channels=16, num_res_blocks=1, norm="position")


@pytest.fixture(scope="module")
def model() -> VQTokenizer:
    torch.manual_seed(3)
    model = VQTokenizer(CONFIG).requires_grad_(False).eval()
    model.quant_conv.weight *= 300  # so that an encoder that was never taught finds more than one code
    return model


@pytest.fixture
def painter(model: VQTokenizer) -> Painter:
    return Painter(model, PICTURES, torch.device("cpu"))


def codes(seed: int) -> tuple[int, ...]:
    return tuple(PICTURES.first_code + (seed * 7 + i * i) % 32 for i in range(15))


def pixels(seed: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, 12 * 20 * 3, dtype=np.uint8).tobytes()


def test_it_knows_its_size(painter: Painter) -> None:
    assert (painter.size, painter.pixels_per_code) == ((12, 20), 4)
    assert painter.held_bytes == sum(parameter.numel() * 4 for parameter in painter._model.parameters())


def test_codes_become_the_tokenizers_pixels(painter: Painter, model: VQTokenizer) -> None:
    (result,) = painter.draw([PictureWork("a", codes=codes(1))])
    table = torch.tensor([[code - 100 for code in codes(1)]]).view(1, 3, 5)
    want = ((model.decode(table).clamp(-1, 1) + 1) * 127.5)[0].permute(1, 2, 0).numpy()
    got = np.frombuffer(result.pixels, np.uint8).reshape(12, 20, 3)
    assert np.abs(got - want).max() <= 0.51, "rounded to the nearest byte"
    assert got.std() > 5, "a grey picture would show little"


def test_pixels_become_the_tokenizers_codes(painter: Painter, model: VQTokenizer) -> None:
    (result,) = painter.encode([PictureWork("a", pixels=pixels(1))])
    image = torch.from_numpy(np.frombuffer(pixels(1), np.uint8).reshape(1, 12, 20, 3).astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    assert result.codes == tuple(100 + code for code in model.encode(image).flatten().tolist())
    assert len(set(result.codes)) > 1


@pytest.mark.parametrize("count", [2, 3, 8])
def test_company_changes_no_byte(painter: Painter, count: int) -> None:
    drawn = [PictureWork(str(seed), codes=codes(seed)) for seed in range(count)]
    read = [PictureWork(str(seed), pixels=pixels(seed)) for seed in range(count)]
    assert painter.draw(drawn) == [result for one in drawn for result in painter.draw([one])]
    assert painter.encode(read) == [result for one in read for result in painter.encode([one])]


@pytest.fixture
def done(painter: Painter) -> Iterator[threading.Event]:
    event = threading.Event()
    painter.on_done = event.set
    yield event
    painter.on_done = lambda: None


def finished(painter: Painter, done: threading.Event) -> list[PictureResult]:
    assert done.wait(30)
    return painter.finished()


def test_a_batch_of_both_kinds_comes_back_once(painter: Painter, done: threading.Event) -> None:
    painter.begin([PictureWork("d", codes=codes(1)), PictureWork("e", pixels=pixels(2))])
    results = {result.request_id: result for result in finished(painter, done)}
    assert set(results) == {"d", "e"}
    assert (len(results["d"].pixels), len(results["e"].codes)) == (720, 15)
    assert painter.finished() == []


def test_a_broken_picture_fails_alone(painter: Painter, done: threading.Event) -> None:
    """A code that is none gets past the engine only by a fault of ours; even so the others are drawn."""
    work = [PictureWork(str(seed), codes=codes(seed)) for seed in range(3)]
    work.insert(1, PictureWork("broken", codes=(5000,) * 15))
    painter.begin(work)
    results = {result.request_id: result for result in finished(painter, done)}
    assert [name for name, result in results.items() if result.is_failed] == ["broken"]
    assert results["2"] == painter.draw([work[-1]])[0]


def test_it_warms_up(painter: Painter) -> None:
    painter.warm_up()
    assert painter.finished() == []
