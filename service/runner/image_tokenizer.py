"""Turns pictures into codes and codes into pictures, in a thread of its own beside the steps. Owns the image tokenizer's weights.

Knows no request and no K/V. Given work by the engine loop with the step that plans it, asked for results before the next one.
Shape suffixes: N pictures, R rows and W columns of codes, Y and X pixels.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from service.model.vq import VQTokenizer
from service.scheduling.plan import PictureResult, PictureWork
from service.vocabulary import PictureIds

log = logging.getLogger("braid.painter")


class Painter:
    """on_done: called in the painter's thread when there are results to be fetched."""

    def __init__(self, model: VQTokenizer, pictures: PictureIds, device: torch.device) -> None:
        self.on_done: Callable[[], None] = lambda: None
        self._model = model
        self._pictures = pictures
        self._device = device
        self._done: deque[PictureResult] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="painter", initializer=_step_back)

    @property
    def pixels_per_code(self) -> int:
        """Of a code's side."""
        return self._model.config.patch

    @property
    def held_bytes(self) -> int:
        """Of the weights."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    def warm_up(self) -> None:
        """One picture both ways, so that the first request meets warm code."""
        height, width = self.size
        self.encode([PictureWork("", pixels=bytes(3 * height * width))])
        self.draw([PictureWork("", codes=(self._pictures.first_code,) * self._pictures.num_places)])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        return self._pictures.rows * self._model.config.patch, self._pictures.columns * self._model.config.patch

    def begin(self, work: Sequence[PictureWork]) -> None:
        self._thread.submit(self._work, work)

    def finished(self) -> list[PictureResult]:
        """Of what was begun, each once. Mutates: the results."""
        found = []
        while self._done:
            found.append(self._done.popleft())
        return found

    def _work(self, work: Sequence[PictureWork]) -> None:
        encode, draw = [one for one in work if one.pixels], [one for one in work if one.codes]
        for part, paint in ((encode, self.encode), (draw, self.draw)):
            if part:
                self._done.extend(self._tried(part, paint))
        self.on_done()

    def _tried(self, work: Sequence[PictureWork], paint: Callable[[Sequence[PictureWork]], list[PictureResult]]) -> list[PictureResult]:
        """A batch that fails is tried one by one, so that a fault of one picture is nobody else's."""
        try:
            return paint(work)
        except Exception:
            log.exception("%d pictures could not be read or drawn", len(work))
        return [PictureResult(work[0].request_id)] if len(work) == 1 else [each for one in work for each in self._tried([one], paint)]

    def encode(self, work: Sequence[PictureWork]) -> list[PictureResult]:
        """Pixels to codes."""
        height, width = self.size
        pixels = np.frombuffer(b"".join(one.pixels for one in work), np.uint8).reshape(len(work), height, width, 3)
        with torch.inference_mode():
            pixels_N3YX = torch.from_numpy(pixels.copy()).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            codes = (self._model.encode(_two(pixels_N3YX))[: len(work)] + self._pictures.first_code).flatten(1).tolist()
        return [PictureResult(one.request_id, codes=tuple(found)) for one, found in zip(work, codes, strict=True)]

    def draw(self, work: Sequence[PictureWork]) -> list[PictureResult]:
        """Codes to pixels."""
        shape = (len(work), self._pictures.rows, self._pictures.columns)
        with torch.inference_mode():
            codes_NRW = torch.tensor([one.codes for one in work], device=self._device).view(shape) - self._pictures.first_code
            drawn_N3YX = self._model.decode(_two(codes_NRW))[: len(work)]
            pixels = ((drawn_N3YX.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return [PictureResult(one.request_id, pixels=each.tobytes()) for one, each in zip(work, pixels, strict=True)]


def _two(batch: Tensor) -> Tensor:
    """At least two: PyTorch's convolutions of one picture go another way on a CPU, and a picture must not depend on its company."""
    return batch if len(batch) > 1 else torch.cat((batch, batch))


def _step_back() -> None:
    """A step never waits for a picture, so the painter gets what the steps leave over. On two cores the slowest hundredth of steps was so
    1.06 to 1.21 times as long beside a busy painter in five runs; with a niceness of 10 1.22 and 1.59 times, with 19 1.14 to 1.46 in three
    (`bench.pictures steps`). The price: processes that take every core, even polite ones, slow drawing down."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
