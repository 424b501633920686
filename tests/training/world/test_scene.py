"""Scenes, what is held out of them, motion, and the drawings that a reader tells apart."""

from __future__ import annotations

from itertools import combinations, product
from random import Random

import numpy as np

from tests.training.world.stand import BRUSH, WORLD
from training.data.stamps import STAMP_NAMES_ZH
from training.world.scene import (
    BACKGROUNDS,
    CELLS,
    Placed,
    Scene,
    Thing,
    all_shapes,
    every_thing,
    film,
    free_places,
    is_pair_held_out,
    is_trained,
    is_triple_held_out,
    scene_of,
)

STAR = Thing("shape", "star", "red", "big")
DOT = Thing("shape", "circle", "black", "small")
CAT = Thing("stamp", "cat")


def any_scene(random: Random) -> Scene:
    return WORLD.scene(random, lambda _: True)


def test_a_tenth_is_held_out() -> None:
    shapes = list(all_shapes())
    assert 0.05 <= sum(map(is_triple_held_out, shapes)) / len(shapes) <= 0.15
    pairs = list(combinations(every_thing(tuple(STAMP_NAMES_ZH)), 2))
    assert 0.09 <= sum(is_pair_held_out(*pair) for pair in pairs) / len(pairs) <= 0.11
    assert all(is_pair_held_out(one, other) == is_pair_held_out(other, one) for one, other in pairs[:500])


def test_every_two_attributes_are_trained_together() -> None:
    """Otherwise a held-out triple would hold a pair of words that was never read, and ask for more than their combination."""
    trained = [each for each in all_shapes() if not is_triple_held_out(each)]
    for parts in combinations(("name", "colour", "size"), 2):
        wanted = {tuple(getattr(each, part) for part in parts) for each in all_shapes()}
        assert {tuple(getattr(each, part) for part in parts) for each in trained} == wanted


def test_scenes_are_whole() -> None:
    random = Random(1)
    for _ in range(2000):
        scene = WORLD.scene(random)
        cells = [cell for each in scene.things for cell in each.cells]
        assert 1 <= len(scene.things) <= 3
        assert len(set(cells)) == len(cells)
        assert all(0 <= row < CELLS and 0 <= column < CELLS for row, column in cells)
        assert is_trained(scene)


def test_a_mover_stops_at_the_border() -> None:
    frames = film(Scene("white", (Placed(2, 1, STAR),)), 0, "right", 4)
    assert [(frame.things[0].row, frame.things[0].column) for frame in frames] == [(2, 2), (2, 3), (2, 3), (2, 3)]


def test_a_mover_stops_before_another_thing_and_keeps_its_identity() -> None:
    """It passes a twin in reading order on its way."""
    scene = scene_of("white", [Placed(0, 3, STAR), Placed(1, 0, STAR), Placed(3, 3, DOT)])
    frames = film(scene, 0, "down", 4)
    rows = [[each.row for each in frame.things if each.column == 3] for frame in frames]
    assert rows == [[1, 3], [2, 3], [2, 3], [2, 3]]
    assert all(Placed(1, 0, STAR) in frame.things for frame in frames)


def test_a_stamp_stops_a_mover_with_all_its_cells() -> None:
    scene = scene_of("white", [Placed(3, 0, DOT), Placed(2, 2, CAT)])
    assert [frame.things[-1].column for frame in film(scene, 1, "right", 4)] == [1, 1, 1, 1]


def test_free_places() -> None:
    things = [Placed(0, 0, CAT), Placed(3, 3, DOT)]
    assert free_places(things, 2) == [(0, 2), (2, 0)]
    taken = {(0, 0), (0, 1), (1, 0), (1, 1), (3, 3)}
    assert free_places(things, 1) == [place for place in product(range(4), range(4)) if place not in taken]


def test_every_thing_is_read_on_every_background() -> None:
    scenes = [Scene(background, (Placed(2, 0, thing),)) for background in BACKGROUNDS for thing in every_thing(tuple(STAMP_NAMES_ZH))]
    assert BRUSH.read(np.stack([BRUSH.draw(scene) for scene in scenes])) == scenes


def test_the_reader_bears_noise() -> None:
    """Standard deviation 30 of 255: a mean squared error as of a picture at 18.6 dB."""
    random, noise = Random(2), np.random.default_rng(2)
    scenes = [any_scene(random) for _ in range(300)]
    pictures = np.stack([BRUSH.draw(scene) for scene in scenes]).astype(np.float32)
    noisy = np.clip(pictures + noise.normal(0, 30, pictures.shape), 0, 255).astype(np.uint8)
    assert sum(map(Scene.__eq__, BRUSH.read(noisy), scenes)) >= 297


def test_the_reader_bears_blur() -> None:
    """Each pixel a third of the way to the mean of its four neighbours, as a small image tokenizer smears."""
    random = Random(3)
    scenes = [any_scene(random) for _ in range(200)]
    pictures = np.stack([BRUSH.draw(scene) for scene in scenes]).astype(np.float32)
    padded = np.pad(pictures, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    mean = (padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]) / 4
    blurred = np.rint(pictures * 2 / 3 + mean / 3).astype(np.uint8)
    assert sum(map(Scene.__eq__, BRUSH.read(blurred), scenes)) >= 198
