"""The pictures that the image tokenizer learns from: emoji, shifted and recoloured a little, and scenes, some in other colours.

numpy only. Called by the recipe. (A scene is never shifted: its things lie on the grid of codes, and shall keep their codes.)
Shape suffixes: N pictures, S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from training.world.draw import SIDE, Brush, Pixels
from training.world.scene import Scene, World, is_trained

MOST_SHIFT = 2


@dataclass(frozen=True, eq=False)
class PictureMix:
    """emoji uint8 [N, S, S, 3]: of the styles that may be trained on; S is the scenes' size too. scene_share: of a batch; 1 where there are
    no emoji. recoloured_share: of the scenes, whose channels change places, so that shapes are learned in more colours than the world's.
    Callable as a `PictureSource`."""

    emoji: Pixels
    world: World
    brush: Brush
    scene_share: float = 0.4
    recoloured_share: float = 0.0

    def __call__(self, random: np.random.Generator, count: int) -> Pixels:
        num_scenes = int(random.binomial(count, self.scene_share))
        scenes = throw_scenes(self.world, Random(int(random.integers(2**62))), num_scenes)
        drawn = draw_scenes(self.brush, scenes, self.emoji.shape[1])
        for index in np.flatnonzero(random.random(num_scenes) < self.recoloured_share):
            drawn[index] = drawn[index][..., random.permutation(3)]
        if num_scenes == count:
            return drawn
        chosen = self.emoji[random.integers(len(self.emoji), size=count - num_scenes)]
        return np.concatenate([augment(chosen, random), drawn])


def draw_scenes(brush: Brush, scenes: Sequence[Scene], size: int = SIDE) -> Pixels:
    """uint8 [N, size, size, 3]; size is a multiple of the brush's own, and its pixels are repeated."""
    factor = size // SIDE
    if not scenes:
        return np.empty((0, size, size, 3), dtype=np.uint8)
    return np.stack([brush.draw(scene) for scene in scenes]).repeat(factor, axis=1).repeat(factor, axis=2)


def throw_scenes(world: World, random: Random, count: int) -> list[Scene]:
    """Scenes that may be trained on."""
    return [world.scene(random, is_trained) for _ in range(count)]


def augment(pictures: Pixels, random: np.random.Generator, *, has_flips: bool = True) -> Pixels:
    """Each picture shifted by up to MOST_SHIFT pixels over white, half of them flipped, half recoloured."""
    count, side = pictures.shape[:2]
    padded = np.pad(pictures, ((0, 0), (MOST_SHIFT, MOST_SHIFT), (MOST_SHIFT, MOST_SHIFT), (0, 0)), constant_values=255)
    moves = random.integers(2 * MOST_SHIFT + 1, size=(count, 2))
    out = np.stack([picture[down : down + side, right : right + side] for picture, (down, right) in zip(padded, moves, strict=True)])
    if has_flips:
        flipped = random.random(count) < 0.5
        out[flipped] = out[flipped, :, ::-1]
    chosen = np.asarray(random.random(count) < 0.5)
    return _recolour(out, chosen, random)


def _recolour(pictures: Pixels, chosen: NDArray[np.bool_], random: np.random.Generator) -> Pixels:
    """Scales each channel's darkness by 0.7 ... 1, so that white stays white. Mutates: pictures."""
    factors = random.uniform(0.7, 1.0, size=(int(chosen.sum()), 1, 1, 3))
    pictures[chosen] = np.rint(255 - (255 - pictures[chosen].astype(np.float32)) * factors)
    return pictures
