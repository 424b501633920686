"""Scenes as pixels, and pixels as scenes: every thing is a small bitmap in cells of 8 x 8 pixels, so a reader can tell them apart.

numpy only. The reader compares every cell with every thing on every background; it measures drawings, it is no part of a model. Called
by training's samples and by evaluation.
Shape suffixes: N pictures, S pixels of a side (32), C candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.world.scene import BACKGROUNDS, CELLS, DIGITS, Placed, Scene, Thing, every_thing, scene_of

Pixels = NDArray[np.uint8]

CELL_PIXELS = 8
SIDE = CELLS * CELL_PIXELS
STAMP_PIXELS = 2 * CELL_PIXELS

COLOUR_RGB = {
    "red": (214, 39, 40),
    "orange": (255, 140, 0),
    "yellow": (240, 210, 20),
    "green": (30, 150, 60),
    "blue": (40, 80, 220),
    "purple": (140, 50, 170),
    "brown": (120, 75, 40),
    "black": (20, 20, 20),
}
BACKGROUND_RGB = {"white": (255, 255, 255), "grey": (200, 200, 200), "sky": (165, 215, 245), "sand": (240, 220, 180)}

_BIG = {
    "circle": "..###.. .#####. ####### ####### ####### .#####. ..###..",
    "square": "####### ####### ####### ####### ####### ####### #######",
    "triangle": "...#... ...#... ..###.. ..###.. .#####. .#####. #######",
    "star": "...#... ...#... ####### .#####. ..###.. .##.##. ##...##",
    "heart": ".##.##. ####### ####### ####### .#####. ..###.. ...#...",
    "cross": "..###.. ..###.. ####### ####### ####### ..###.. ..###..",
}
_SMALL = {
    "circle": ".###. ##### ##### ##### .###.",
    "square": "##### ##### ##### ##### #####",
    "triangle": "..#.. ..#.. .###. .###. #####",
    "star": "#.#.# .###. ##### .###. #.#.#",
    "heart": ".#.#. ##### ##### .###. ..#..",
    "cross": "..#.. ..#.. ##### ..#.. ..#..",
}
_DIGIT = dict(
    zip(
        DIGITS,
        (
            ".###. #...# #..## #.#.# ##..# #...# .###.",
            "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
            ".###. #...# ....# ...#. ..#.. .#... #####",
            "##### ...#. ..#.. ...#. ....# #...# .###.",
            "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
            "##### #.... ####. ....# ....# #...# .###.",
            "..##. .#... #.... ####. #...# #...# .###.",
            "##### ....# ...#. ..#.. .#... .#... .#...",
            ".###. #...# #...# .###. #...# #...# .###.",
            ".###. #...# #...# .#### ....# ...#. .##..",
        ),
        strict=True,
    )
)


def _bitmap(text: str) -> NDArray[np.bool_]:
    """[8, 8]: the drawing in the middle of a cell's first seven pixels, so that neighbours never touch."""
    rows = np.array([[letter == "#" for letter in row] for row in text.split()])
    down, right = (7 - rows.shape[0]) // 2, (7 - rows.shape[1]) // 2
    cell = np.zeros((CELL_PIXELS, CELL_PIXELS), dtype=bool)
    cell[down : down + rows.shape[0], right : right + rows.shape[1]] = rows
    return cell


_MASKS = {
    **{("shape", name, "big"): _bitmap(text) for name, text in _BIG.items()},
    **{("shape", name, "small"): _bitmap(text) for name, text in _SMALL.items()},
    **{("digit", name, ""): _bitmap(text) for name, text in _DIGIT.items()},
}


@dataclass(frozen=True, eq=False)
class Brush:
    """Draws scenes and reads them. stamps: uint8 RGBA [16, 16, 4] by name, of the small emoji that scenes may hold."""

    stamps: Mapping[str, Pixels]

    def draw(self, scene: Scene) -> Pixels:
        """uint8 [S, S, 3]. Raises: KeyError for a stamp without a picture."""
        canvas = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
        canvas[:] = BACKGROUND_RGB[scene.background]
        for placed in scene.things:
            top, left, side = placed.row * CELL_PIXELS, placed.column * CELL_PIXELS, placed.thing.span * CELL_PIXELS
            self._paint(canvas[top : top + side, left : left + side], placed.thing)
        return canvas

    def _paint(self, place: Pixels, thing: Thing) -> None:
        """Mutates: place."""
        if thing.kind == "stamp":
            stamp = self.stamps[thing.name].astype(np.float32)
            alpha = stamp[..., 3:] / 255
            place[:] = np.rint(place * (1 - alpha) + stamp[..., :3] * alpha)
        else:
            place[_MASKS[thing.kind, thing.name, thing.size]] = COLOUR_RGB[thing.colour]

    def read(self, pictures: Pixels) -> list[Scene]:
        """What uint8 [N, S, S, 3] show, each cell by the candidate nearest in squared distance, the background by the least sum."""
        scores = np.stack([self._score(pictures, name) for name in BACKGROUNDS])
        best = scores.argmin(0)
        return [self._read_one(picture, BACKGROUNDS[index]) for picture, index in zip(pictures, best, strict=True)]

    @cached_property
    def _cell_things(self) -> list[Thing | None]:
        return [None, *every_thing(())]

    @cached_property
    def _templates(self) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Per background: cells [C, 8 * 8 * 3] and stamps [C, 16 * 16 * 3]."""
        return {name: (self._painted(name, self._cell_things, CELL_PIXELS), self._stamped(name)) for name in BACKGROUNDS}

    def _stamped(self, background: str) -> NDArray[np.float32]:
        return self._painted(background, [Thing("stamp", name) for name in self.stamps], STAMP_PIXELS)

    def _painted(self, background: str, things: list[Any], side: int) -> NDArray[np.float32]:
        out = np.empty((len(things), side, side, 3), dtype=np.uint8)
        out[:] = BACKGROUND_RGB[background]
        for place, thing in zip(out, things, strict=True):
            if thing is not None:
                self._paint(place, thing)
        return out.reshape(len(things), side * side * 3).astype(np.float32)

    def _distances(self, pictures: Pixels, background: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Squared distances of cells [N, 16, C] and of quadrants [N, 4, C]."""
        cells, stamps = self._templates[background]
        return _squared(_cut(pictures, CELL_PIXELS), cells), _squared(_cut(pictures, STAMP_PIXELS), stamps)

    def _score(self, pictures: Pixels, background: str) -> NDArray[np.float32]:
        cells, stamps = self._distances(pictures, background)
        apart = _by_quadrant(cells.min(-1)).sum(-1)
        return np.asarray(np.minimum(apart, stamps.min(-1, initial=np.inf)).sum(-1))

    def _read_one(self, picture: Pixels, background: str) -> Scene:
        cells, stamps = (each[0] for each in self._distances(picture[None], background))
        apart = _by_quadrant(cells.min(-1)[None])[0].sum(-1)
        things = []
        for quadrant in range(4):
            row, column = 2 * (quadrant // 2), 2 * (quadrant % 2)
            if stamps.shape[-1] and stamps[quadrant].min() < apart[quadrant]:
                things.append(Placed(row, column, Thing("stamp", list(self.stamps)[int(stamps[quadrant].argmin())])))
                continue
            for down, right in product(range(2), repeat=2):
                thing = self._cell_things[int(cells[(row + down) * CELLS + column + right].argmin())]
                if thing is not None:
                    things.append(Placed(row + down, column + right, thing))
        return scene_of(background, things)


def _cut(pictures: Pixels, side: int) -> NDArray[np.float32]:
    """[N, tiles in reading order, side * side * 3]."""
    count = SIDE // side
    tiles = pictures.reshape(-1, count, side, count, side, 3).swapaxes(2, 3)
    return tiles.reshape(len(pictures), count * count, side * side * 3).astype(np.float32)


def _squared(tiles: NDArray[np.float32], templates: NDArray[np.float32]) -> NDArray[np.float32]:
    cross = tiles @ templates.T
    own = np.square(tiles).sum(-1, keepdims=True) + np.square(templates).sum(-1)
    return np.asarray(own - 2 * cross, dtype=np.float32)


def _by_quadrant(cells: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, 16] in reading order to [N, 4 quadrants, 4 cells]."""
    return cells.reshape(-1, 2, 2, 2, 2).swapaxes(2, 3).reshape(-1, 4, 4)
