"""Which of known pictures another picture is most like, by colour and edges: a judge without anything learned.

numpy only. Called by the memory's part of evaluation, and by ablations for the distance of features.
Shape suffixes: N pictures, C candidates, S pixels of a side, D features.
Source: Dalal and Triggs 2005, section 6 (histograms of oriented gradients).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float32]
Pixels = NDArray[np.uint8]

COLOUR_SIDE, CELLS, DIRECTIONS = 16, 8, 8


def colours(pictures: Pixels) -> Features:
    """The mean colour of each of 16 x 16 places, [N, 16 * 16 * 3] from 0 to 1."""
    count, side = pictures.shape[:2]
    step = side // COLOUR_SIDE
    tiles = pictures.reshape(count, COLOUR_SIDE, step, COLOUR_SIDE, step, 3).astype(np.float32)
    return np.asarray(tiles.mean((2, 4)).reshape(count, -1) / 255)


def gradients(pictures: Pixels) -> Features:
    """How much edge runs in each of 8 directions in each of 8 x 8 cells, [N, 8 * 8 * 8], of length 1 for every picture."""
    light = pictures.astype(np.float32).mean(-1) / 255
    down, right = np.gradient(light, axis=1), np.gradient(light, axis=2)
    strength = np.hypot(down, right)
    direction = np.floor((np.arctan2(down, right) % np.pi) / np.pi * DIRECTIONS).astype(np.int64) % DIRECTIONS
    count, side = light.shape[:2]
    cell = np.arange(side) * CELLS // side
    place = (np.arange(count)[:, None, None] * CELLS + cell[:, None]) * CELLS + cell
    sums = np.bincount((place * DIRECTIONS + direction).ravel(), strength.ravel(), minlength=count * CELLS * CELLS * DIRECTIONS)
    histogram = sums.reshape(count, -1)
    return np.asarray(histogram / np.maximum(np.linalg.norm(histogram, axis=1, keepdims=True), 1e-6), dtype=np.float32)


class NearestPicture:
    """Finds the candidate most like a picture. Colour and edges count alike: each is divided by its mean distance among candidates."""

    def __init__(self, candidates: Pixels) -> None:
        """candidates: uint8 [C, S, S, 3], two of them or more; S a multiple of 16."""
        self._parts = [(extract, known, _spread(known)) for extract in (colours, gradients) for known in (extract(candidates),)]

    def to(self, pictures: Pixels) -> NDArray[np.int64]:
        """The index of the candidate most like each picture, int64 [N]; of equally near ones the first."""
        total = sum((_distances(extract(pictures), known) / spread for extract, known, spread in self._parts), start=np.float32(0))
        return np.asarray(np.argmin(total, axis=1), dtype=np.int64)


def _spread(known: Features) -> float:
    """The mean distance of two different candidates."""
    count = len(known)
    return float(max(_distances(known, known).sum() / max(count * (count - 1), 1), 1e-6))


def _distances(one: Features, other: Features) -> NDArray[np.float32]:
    """Euclidean, [N, C]."""
    squared = np.square(one).sum(1)[:, None] + np.square(other).sum(1)[None] - 2 * one @ other.T
    return np.asarray(np.sqrt(np.maximum(squared, 0)), dtype=np.float32)


def mean_distance(one: Pixels, other: Pixels) -> float:
    """Of the edges of pictures [N, S, S, 3] and of those that shall be like them, one by one."""
    return float(np.linalg.norm(gradients(one) - gradients(other), axis=1).mean())
