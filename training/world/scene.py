"""The world with rules: which things there are, what a scene is, and how one is thrown at random, held-out combinations apart.

Plain values and `random.Random`: no pixels (draw.py), no words (grammar.py). Called by everything in this folder and by evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from operator import attrgetter
from random import Random
from typing import Literal

from training.data.split import is_held_out

CELLS = 4
"""Cells in a row and in a column of a scene."""
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
SIZES = ("small", "big")
BACKGROUNDS = ("white", "grey", "sky", "sand")
DIGITS = tuple("0123456789")
HELD_OUT_SHARE = 0.1
MOST_THINGS = 3

Kind = Literal["shape", "digit", "stamp"]
Direction = Literal["up", "down", "left", "right"]
STEPS: dict[Direction, tuple[int, int]] = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


@dataclass(frozen=True, slots=True, order=True)
class Thing:
    """A shape has colour and size, a digit a colour, a stamp (a small emoji, two cells wide and high) neither."""

    kind: Kind
    name: str
    colour: str = ""
    size: str = ""

    @property
    def span(self) -> int:
        """Cells it takes in each direction."""
        return 2 if self.kind == "stamp" else 1


@dataclass(frozen=True, slots=True, order=True)
class Placed:
    """A thing whose upper left cell is (row, column), counted from 0. A stamp's are even."""

    row: int
    column: int
    thing: Thing

    @property
    def cells(self) -> frozenset[tuple[int, int]]:
        return _cells(self.row, self.column, self.thing.span)


@cache
def _cells(row: int, column: int, span: int) -> frozenset[tuple[int, int]]:
    return frozenset(product(range(row, row + span), range(column, column + span)))


@dataclass(frozen=True, slots=True)
class Scene:
    """A background and one to three things in reading order, no two in one cell."""

    background: str
    things: tuple[Placed, ...]


_place = attrgetter("row", "column")


def scene_of(background: str, things: Sequence[Placed]) -> Scene:
    """The scene with its things put in reading order."""
    return Scene(background, tuple(sorted(things, key=_place)))


@cache
def is_triple_held_out(thing: Thing) -> bool:
    """Whether a shape of this colour and size is never trained on."""
    return thing.kind == "shape" and is_held_out(f"{thing.name}/{thing.colour}/{thing.size}", HELD_OUT_SHARE, "triple")


@cache
def is_pair_held_out(one: Thing, other: Thing) -> bool:
    """Whether these two are never trained on together, in either order."""
    names = sorted("/".join((each.kind, each.name, each.colour, each.size)) for each in (one, other))
    return is_held_out("+".join(names), HELD_OUT_SHARE, "pair")


def has_held_out_triple(scene: Scene) -> bool:
    return any(is_triple_held_out(each.thing) for each in scene.things)


def has_held_out_pair(scene: Scene) -> bool:
    return any(is_pair_held_out(one.thing, other.thing) for one, other in combinations(scene.things, 2))


def is_trained(scene: Scene) -> bool:
    """Whether the scene may be shown in training."""
    return not has_held_out_triple(scene) and not has_held_out_pair(scene)


def is_only_pair_held_out(scene: Scene) -> bool:
    """A combination never trained, of things that were."""
    return has_held_out_pair(scene) and not has_held_out_triple(scene)


class World:
    """Throws scenes. stamps: names of the small emoji that may appear; none leaves them out."""

    def __init__(self, stamps: Sequence[str] = ()) -> None:
        self.stamps = tuple(stamps)

    def thing(self, random: Random) -> Thing:
        """Seven shapes for every two stamps and every digit."""
        draw = random.random()
        if draw < 0.2 and self.stamps:
            return Thing("stamp", random.choice(self.stamps))
        if draw < 0.3:
            return Thing("digit", random.choice(DIGITS), random.choice(COLOURS))
        return Thing("shape", random.choice(SHAPES), random.choice(COLOURS), random.choice(SIZES))

    def scene(self, random: Random, allowed: Callable[[Scene], bool] = is_trained, num_things: int | None = None) -> Scene:
        """A scene for which `allowed` holds; num_things None: one, two or three."""
        while True:
            scene = self._any(random, num_things or random.randint(1, MOST_THINGS))
            if allowed(scene):
                return scene

    def _any(self, random: Random, num_things: int) -> Scene:
        placed: list[Placed] = []
        while len(placed) < num_things:
            thing = self.thing(random)
            step = thing.span
            place = Placed(random.randrange(0, CELLS, step), random.randrange(0, CELLS, step), thing)
            if not any(place.cells & other.cells for other in placed):
                placed.append(place)
        return scene_of(random.choice(BACKGROUNDS), placed)


def moved(scene: Scene, index: int, direction: Direction) -> Scene:
    """The scene after its index-th thing went one cell that way; it stays where the border or another thing is in its way."""
    down, right = STEPS[direction]
    mover = scene.things[index]
    target = Placed(mover.row + down, mover.column + right, mover.thing)
    others = [other for at, other in enumerate(scene.things) if at != index]
    is_inside = 0 <= target.row < CELLS and 0 <= target.column < CELLS
    if mover.thing.span > 1 or not is_inside or any(target.cells & other.cells for other in others):
        return scene
    return scene_of(scene.background, [*others, target])


def film(scene: Scene, index: int, direction: Direction, num_frames: int) -> tuple[Scene, ...]:
    """The frames after the scene while its index-th thing goes that way, as `moved` has it."""
    others = [each for at, each in enumerate(scene.things) if at != index]
    frames: list[Scene] = []
    for _ in range(num_frames):
        scene = moved(scene, index, direction)
        index = next(at for at, each in enumerate(scene.things) if each not in others)
        frames.append(scene)
    return tuple(frames)


def free_places(things: Sequence[Placed], span: int) -> list[tuple[int, int]]:
    """Where a thing of that span can stand beside the others: rows and columns of its upper left cell."""
    taken = {cell for each in things for cell in each.cells}
    steps = range(0, CELLS, span)
    return [place for place in product(steps, steps) if not _cells(*place, span) & taken]


def all_shapes() -> Iterator[Thing]:
    """Every shape in every colour and size."""
    for name, colour, size in product(SHAPES, COLOURS, SIZES):
        yield Thing("shape", name, colour, size)


def every_thing(stamps: Sequence[str]) -> list[Thing]:
    """All that a cell or, for a stamp, four cells can hold."""
    digits = [Thing("digit", name, colour) for name, colour in product(DIGITS, COLOURS)]
    return [*all_shapes(), *digits, *(Thing("stamp", name) for name in stamps)]
