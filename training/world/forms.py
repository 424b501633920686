"""What a maker of tasks is given and what it gives: a world, dice, a language and a rule of what may occur; a turn of prompt and reply.

Makes no task itself. Called by tasks.py and by the makers (questions.py, edits.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from random import Random
from typing import Literal

from training.world.phrases import Lang, Mention
from training.world.scene import (
    Scene,
    Thing,
    World,
    has_held_out_triple,
    is_only_pair_held_out,
    is_pair_held_out,
    is_trained,
    is_triple_held_out,
)

Pieces = tuple[str | Scene, ...]
HeldOut = Literal["triple", "pair"]


@dataclass(frozen=True, slots=True)
class Turn:
    """What a user says and what is answered, in pieces: text, or a picture as the scene to be drawn. Consecutive scenes are a film."""

    prompt: Pieces
    reply: Pieces


@dataclass(frozen=True, slots=True)
class Rule:
    """What may occur in a task.

    shows: every scene that is read or drawn, bar the one that `begins` an edit which changes an attribute or adds a thing. is_subject:
    which things of a scene the task may be about. may_name: shapes that may be named with all attributes though no scene shows them.
    only_subjects: no question about what is absent, or about no thing at all.
    """

    shows: Callable[[Scene], bool]
    begins: Callable[[Scene], bool]
    is_subject: Callable[[Scene, int], bool] = lambda scene, index: True
    may_name: Callable[[Thing], bool] = lambda thing: True
    only_subjects: bool = False


def training_rule(allowed: Callable[[Scene], bool] = is_trained) -> Rule:
    """Nothing held out anywhere: not in a scene, not in words."""
    return Rule(allowed, allowed, may_name=lambda thing: not is_triple_held_out(thing))


def _is_triple(scene: Scene, index: int) -> bool:
    return is_triple_held_out(scene.things[index].thing)


def _is_in_pair(scene: Scene, index: int) -> bool:
    thing = scene.things[index].thing
    return any(is_pair_held_out(thing, other.thing) for at, other in enumerate(scene.things) if at != index)


HELD_OUT_RULES: Mapping[HeldOut, Rule] = {
    "triple": Rule(has_held_out_triple, is_trained, _is_triple, only_subjects=True),
    "pair": Rule(is_only_pair_held_out, is_trained, _is_in_pair, only_subjects=True),
}


@dataclass(frozen=True, slots=True)
class Throw:
    """All that a maker needs."""

    world: World
    random: Random
    lang: Lang
    rule: Rule

    def scene(self) -> Scene:
        """One that may be shown."""
        return self.world.scene(self.random, self.rule.shows)

    def subject(self, scene: Scene) -> int | None:
        """One of the things that the task may be about."""
        indices = [index for index in range(len(scene.things)) if self.rule.is_subject(scene, index)]
        return self.random.choice(indices) if indices else None

    def mention(self, scene: Scene, index: int, without: str = "") -> Mention | None:
        """Attributes that fit this thing and no other of the scene. without: the name of an attribute to leave out."""
        fitting = [each for each in _mentions(scene.things[index].thing, without) if _fits_one(each, scene)]
        return self.random.choice(fitting) if fitting else None


def another(value: str, values: Sequence[str], random: Random) -> str:
    return random.choice([each for each in values if each != value])


Maker = Callable[[Throw], Turn | None]
"""None when what was thrown does not make such a task: throw again."""


def _fits_one(mention: Mention, scene: Scene) -> bool:
    return sum(mention.fits(each.thing) for each in scene.things) == 1


@cache
def _mentions(thing: Thing, without: str) -> tuple[Mention, ...]:
    """Every way to point at it by one attribute or more."""
    said = {part: value for part in Mention._fields if part != without and (value := getattr(thing, part))}
    return tuple(Mention(**dict(chosen)) for count in range(1, len(said) + 1) for chosen in combinations(said.items(), count))
