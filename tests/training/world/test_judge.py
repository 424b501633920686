"""The judge of replies: what is right passes, each single thing that is wrong does not, and shares say how wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from tests.training.world.stand import BRUSH, WORLD
from training.world.draw import SIDE, Pixels
from training.world.forms import Turn
from training.world.grammar import describe
from training.world.judge import Verdict, is_right, judge
from training.world.phrases import LANGS
from training.world.scene import Placed, Scene, Thing, film, scene_of
from training.world.tasks import TASK_NAMES, Task, make

STAR = Placed(0, 1, Thing("shape", "star", "red", "big"))
SEVEN = Placed(3, 3, Thing("digit", "7", "blue"))
WANTED = Scene("sand", (STAR, SEVEN))
DRAW = Task("draw", "draw", "en", Turn((describe(WANTED, "en"),), (WANTED,)))
DESCRIBE = Task("describe", "describe", "en", Turn((WANTED, "Describe."), (describe(WANTED, "en"),)))


def drawn(*scenes: Scene) -> Pixels:
    return np.stack([BRUSH.draw(scene) for scene in scenes]) if scenes else np.empty((0, SIDE, SIDE, 3), dtype=np.uint8)


def verdict(task: Task, text: str = "", scenes: Sequence[Scene] = ()) -> Verdict:
    return is_right(task, [text] if text else [], drawn(*scenes), BRUSH)


def test_right_replies_are_right() -> None:
    random = Random(1)
    tasks = [make(name, WORLD, random, random.choice(LANGS)) for name in TASK_NAMES for _ in range(60)]
    found = judge(tasks, [[task.text] if task.text else [] for task in tasks], [drawn(*task.scenes) for task in tasks], BRUSH)
    assert all(each.is_right for each in found)
    assert all(each.things == each.attributes == each.background == 1 for each in found)


def test_replies_of_other_tasks_are_wrong() -> None:
    random = Random(2)
    tasks = [make(name, WORLD, random, "en") for name in ("draw", "describe", "edit", "move") for _ in range(40)]
    others = [*tasks[1:], tasks[0]]
    found = judge(tasks, [[task.text] if task.text else [] for task in others], [drawn(*task.scenes) for task in others], BRUSH)
    assert not any(each.is_right for each in found)


def star(**changes: str) -> Scene:
    return scene_of("sand", [replace(STAR, thing=replace(STAR.thing, **changes)), SEVEN])


def seven(**changes: str) -> Scene:
    return scene_of("sand", [STAR, replace(SEVEN, thing=replace(SEVEN.thing, **changes))])


# The star has four attributes (it is there, name, colour, size), the digit three.
WRONG = {
    "colour": (star(colour="orange"), 1 / 2, 6 / 7, True),
    "size": (star(size="small"), 1 / 2, 6 / 7, True),
    "shape": (star(name="heart"), 1 / 2, 6 / 7, True),
    "digit": (seven(name="1"), 1 / 2, 6 / 7, True),
    "colour of the digit": (seven(colour="purple"), 1 / 2, 6 / 7, True),
    "background": (Scene("white", WANTED.things), 1, 1, False),
    "row": (scene_of("sand", [replace(STAR, row=1), SEVEN]), 1 / 2, 3 / 7, True),
    "column": (scene_of("sand", [STAR, replace(SEVEN, column=2)]), 1 / 2, 4 / 7, True),
    "a thing less": (Scene("sand", (STAR,)), 1 / 2, 4 / 7, True),
    "a thing more": (scene_of("sand", [STAR, SEVEN, Placed(2, 0, STAR.thing)]), 2 / 3, 7 / 8, True),
    "two things for one another": (scene_of("sand", [replace(STAR, thing=SEVEN.thing), replace(SEVEN, thing=STAR.thing)]), 0, 2 / 7, True),
    "everything": (Scene("sky", (Placed(2, 2, Thing("stamp", "cat")),)), 0, 0, False),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("task", [DRAW, DESCRIBE], ids=["draw", "describe"])
def test_each_single_error_is_caught(task: Task, what: str) -> None:
    scene, things, attributes, has_background = WRONG[what]
    found = verdict(task, scenes=[scene]) if task is DRAW else verdict(task, text=describe(scene, "en"))
    assert not found.is_right
    assert found.things == pytest.approx(things)
    assert found.attributes == pytest.approx(attributes)
    assert found.background == has_background


def test_descriptions_may_be_worded_freely() -> None:
    assert verdict(DESCRIBE, "On sand: row 4, column 4: a blue digit 7; row 1, column 2: a large red star.").is_right
    assert verdict(DESCRIBE, describe(WANTED, "zh")).is_right


def test_an_unreadable_description_has_nothing_right() -> None:
    found = verdict(DESCRIBE, "a red star somewhere")
    assert (found.is_right, found.things, found.attributes, found.background) == (False, 0, 0, 0)


def test_films_are_judged_frame_by_frame() -> None:
    frames = film(WANTED, 0, "down", 4)
    task = Task("move", "move", "en", Turn((WANTED, "The star moves down."), frames))
    assert verdict(task, scenes=frames).is_right
    found = verdict(task, scenes=[*frames[:2], frames[1], frames[3]])
    assert not found.is_right
    assert [each.is_same for each in found.scenes] == [True, True, False, True]
    short = verdict(task, scenes=frames[:3])
    assert not short.is_right
    assert [each.is_same for each in short.scenes] == [True, True, True, False]
    assert not verdict(task, scenes=[*frames, frames[-1]]).is_right


def test_what_was_not_asked_for_is_wrong() -> None:
    assert not verdict(DRAW, "Here it is.", [WANTED]).is_right
    assert not verdict(DRAW, scenes=[WANTED, WANTED]).is_right
    assert not verdict(DRAW).is_right
    assert not verdict(DRAW, describe(WANTED, "en")).is_right
    assert not verdict(DESCRIBE, describe(WANTED, "en"), [WANTED]).is_right


@pytest.mark.parametrize(
    ("wanted", "reply", "is_same"),
    [
        ("red", "red", True),
        ("red", " Red.\n", True),
        ("2", "２", True),
        ("红色", "红色。", True),
        ("red", "orange", False),
        ("red", "red star", False),
        ("2", "3", False),
        ("yes", "", False),
        ("没有", "有", False),
    ],
)
def test_words_are_compared_without_case_and_full_stop(wanted: str, reply: str, is_same: bool) -> None:
    task = Task("ask", "colour", "en", Turn((WANTED, "What colour is the star?"), (wanted,)))
    found = verdict(task, reply)
    assert found.is_right == is_same
    assert found.things == found.attributes == float(is_same)


def test_a_copy_of_the_source_is_named() -> None:
    task = Task("edit", "recolour", "en", Turn((WANTED, "Make the star orange."), (star(colour="orange"),)))
    assert verdict(task, scenes=[WANTED]).is_copy
    assert not verdict(task, scenes=[star(colour="orange")]).is_copy
    assert not verdict(task, scenes=[star(colour="blue")]).is_copy


def test_many_are_judged_as_one_by_one() -> None:
    random = Random(3)
    tasks = [make(name, WORLD, random, "en") for name in TASK_NAMES for _ in range(5)]
    texts = [[task.text] if task.text else [] for task in tasks]
    pictures = [drawn(*task.scenes[: random.randint(0, 4)]) for task in tasks]
    together = judge(tasks, texts, pictures, BRUSH)
    assert together == [is_right(*each, BRUSH) for each in zip(tasks, texts, pictures, strict=True)]
    assert {each.is_right for each in together} == {True, False}


def test_unequal_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        judge([DRAW, DRAW], [[], []], [drawn(WANTED)], BRUSH)
