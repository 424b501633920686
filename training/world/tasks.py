"""The tasks of the world, thrown without end: draw, describe, count, ask, edit, move; for training, and for tests of generalisation.

A task is plain values: text and scenes, no pixels and no ids. Called by training's samples and by evaluation; judge.py judges the replies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal

from training.world.edits import EDITS, MOVES
from training.world.forms import HELD_OUT_RULES, HeldOut, Maker, Throw, Turn, training_rule
from training.world.grammar import describe, request
from training.world.phrases import Lang
from training.world.questions import COUNTS, NOT_ABOUT_THINGS, QUESTIONS
from training.world.scene import Scene, World, is_trained
from training.world.wording import worded

TaskName = Literal["draw", "describe", "count", "ask", "edit", "move"]


@dataclass(frozen=True, slots=True)
class Task:
    """A turn with the reply that is right. form: which kind of question or edit it is, for figures by kind."""

    name: TaskName
    form: str
    lang: Lang
    turn: Turn

    @property
    def source(self) -> Scene | None:
        """The picture in the prompt."""
        return next((piece for piece in self.turn.prompt if isinstance(piece, Scene)), None)

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """The pictures of the right reply."""
        return tuple(piece for piece in self.turn.reply if isinstance(piece, Scene))

    @property
    def text(self) -> str:
        """The text of the right reply."""
        return "".join(piece for piece in self.turn.reply if isinstance(piece, str))


def _draw(throw: Throw) -> Turn | None:
    scene = throw.scene()
    return Turn((request(scene, throw.lang, throw.random),), (scene,))


def _describe(throw: Throw) -> Turn | None:
    scene = throw.scene()
    return Turn((scene, worded("describe", throw.lang, throw.random)), (describe(scene, throw.lang),))


_MAKERS: Mapping[TaskName, Mapping[str, Maker]] = {
    "draw": {"draw": _draw},
    "describe": {"describe": _describe},
    "count": COUNTS,
    "ask": QUESTIONS,
    "edit": EDITS,
    "move": MOVES,
}
TASK_NAMES: tuple[TaskName, ...] = tuple(_MAKERS)


def make(name: TaskName, world: World, random: Random, lang: Lang, allowed: Callable[[Scene], bool] = is_trained) -> Task:
    """A task for training: every scene in it is `allowed`, and no words name a held-out shape by colour, size and name together.

    Raises: KeyError for a name that is not in TASK_NAMES.
    """
    return _make(name, Throw(world, random, lang, training_rule(allowed)))


def make_held_out(name: TaskName, world: World, random: Random, lang: Lang, kind: HeldOut) -> Task:
    """A task that needs a combination never trained: a shape with a held-out triple of attributes, or (with no such shape) a held-out pair.

    draw, describe, count: the scene has the combination; a count by colour or shape is of one that a thing of it has.
    ask: so has the scene, and the question is about a thing of the combination; what is asked for in vain differs from it in one attribute.
    edit: the result has it. Where an attribute changes or a thing is added, what the edit begins with is trained, so the edit makes the
    combination; where a thing is moved (it is one of the combination) or removed, or the background changes, the combination stays.
    move: every frame has it, and the mover is one of it.
    Raises: KeyError for a name that is not in TASK_NAMES.
    """
    return _make(name, Throw(world, random, lang, HELD_OUT_RULES[kind]))


def _make(name: TaskName, throw: Throw) -> Task:
    forms = [each for each in _MAKERS[name] if not throw.rule.only_subjects or each not in NOT_ABOUT_THINGS]
    form = throw.random.choice(forms)
    while (turn := _MAKERS[name][form](throw)) is None:
        pass  # What was thrown does not make this form of task.
    return Task(name, form, throw.lang, turn)
