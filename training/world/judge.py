"""Judges replies to the world's tasks by what they show and say: exactly right or not, and how much of each scene is right.

Reads pixels through the brush and sentences through the grammar; runs no model. Called by evaluation.
Shape suffixes: N pictures of a reply, S pixels of a side (32).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.world.draw import Brush, Pixels
from training.world.grammar import parse
from training.world.scene import Scene, Thing
from training.world.tasks import Task


@dataclass(frozen=True, slots=True)
class Likeness:
    """How much of a wanted scene is there, thing by thing at its place. things, attributes: shares (0 ... 1), of the larger number where
    there are more things than wanted.

    A thing has as attributes that it stands there at all, its name, and its colour and size where it has them.
    """

    is_same: bool
    things: float
    attributes: float
    has_background: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """is_right: everything asked for and no more. scenes: one likeness for every picture, or for the description, that was asked for;
    empty where the answer is a word. is_copy: all pictures show what the prompt's picture shows."""

    is_right: bool
    scenes: tuple[Likeness, ...] = ()
    is_copy: bool = False

    @property
    def things(self) -> float:
        return self._mean([each.things for each in self.scenes])

    @property
    def attributes(self) -> float:
        return self._mean([each.attributes for each in self.scenes])

    @property
    def background(self) -> float:
        return self._mean([float(each.has_background) for each in self.scenes])

    def _mean(self, shares: list[float]) -> float:
        return sum(shares) / len(shares) if shares else float(self.is_right)


def is_right(task: Task, reply_texts: Sequence[str], reply_pictures: Pixels, brush: Brush) -> Verdict:
    """reply_texts: all pieces of text of the reply; reply_pictures: uint8 [N, S, S, 3], N may be 0."""
    return judge([task], [reply_texts], [reply_pictures], brush)[0]


def judge(tasks: Sequence[Task], texts: Sequence[Sequence[str]], pictures: Sequence[Pixels], brush: Brush) -> list[Verdict]:
    """`is_right` of many tasks at once, one reply each, with all pictures read together. Raises: ValueError for unequal numbers."""
    shown = iter(brush.read(np.concatenate(pictures)) if sum(len(each) for each in pictures) else [])
    verdicts = []
    for task, pieces, reply in zip(tasks, texts, pictures, strict=True):
        seen = [next(shown) for _ in range(len(reply))]
        verdicts.append(_judged(task, "".join(pieces), seen))
    return verdicts


def likeness(wanted: Scene, found: Scene | None) -> Likeness:
    """found: None when nothing readable came."""
    if found is None:
        return Likeness(is_same=False, things=0.0, attributes=0.0, has_background=False)
    there = {(each.row, each.column): each.thing for each in found.things}
    pairs = [(each.thing, there.get((each.row, each.column))) for each in wanted.things]
    most = len(pairs) + max(0, len(found.things) - len(pairs))
    attributes = [_attributes(thing, other) for thing, other in pairs]
    num_attributes = sum(len(each) for each in attributes) + most - len(pairs)
    return Likeness(
        is_same=found == wanted,
        things=sum(thing == other for thing, other in pairs) / most,
        attributes=sum(sum(each) for each in attributes) / num_attributes,
        has_background=found.background == wanted.background,
    )


def _attributes(wanted: Thing, found: Thing | None) -> list[bool]:
    """Which of a thing's attributes are right: that it is there, its name, its colour and size if any."""
    said = [part for part in ("name", "colour", "size") if getattr(wanted, part)]
    return [found is not None, *(found is not None and getattr(found, part) == getattr(wanted, part) for part in said)]


def _judged(task: Task, text: str, seen: list[Scene]) -> Verdict:
    if task.scenes:
        scenes = tuple(likeness(wanted, seen[at] if at < len(seen) else None) for at, wanted in enumerate(task.scenes))
        is_whole = len(seen) == len(scenes) and not text.strip()
        is_copy = bool(seen) and all(each == task.source for each in seen)
        return Verdict(is_whole and all(each.is_same for each in scenes), scenes, is_copy)
    if task.name == "describe" and task.source is not None:
        found = likeness(task.source, parse(text))
        return Verdict(found.is_same and not seen, (found,))
    return Verdict(_plain(text) == _plain(task.text) and not seen)


def _plain(text: str) -> str:
    """Without case, width, outer spaces and a full stop."""
    return unicodedata.normalize("NFKC", text).lower().strip(" \t\n.。")
