"""Tasks of the world: right by an independent reading of their words, free of what is held out, and full of it where that is asked for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product
from random import Random

import pytest

from tests.training.world.stand import WORLD, answer, attributes, edited, mentioned
from training.world.forms import HeldOut
from training.world.grammar import describe, parse
from training.world.phrases import LANGS, THING_PHRASES, Lang
from training.world.scene import (
    Scene,
    Thing,
    World,
    all_shapes,
    has_held_out_pair,
    has_held_out_triple,
    is_pair_held_out,
    is_trained,
    is_triple_held_out,
    scene_of,
)
from training.world.tasks import TASK_NAMES, Task, make, make_held_out

FORMS = {
    "draw": {"draw"},
    "describe": {"describe"},
    "count": {"all", "of colour", "of shape"},
    "ask": {"colour", "shape", "size", "place", "exists", "background"},
    "edit": {"recolour", "resize", "reshape", "relocate", "remove", "add", "set background"},
    "move": {"move"},
}
MAKING = ("recolour", "resize", "reshape", "add")
"""Edits that make a combination."""


def thrown(name: str, count: int, seed: int = 0) -> Iterator[Task]:
    random = Random(seed)
    return (make(name, WORLD, random, random.choice(LANGS)) for _ in range(count))


def held_out(name: str, kind: HeldOut, count: int, seed: int = 0) -> Iterator[Task]:
    random = Random(seed)
    return (make_held_out(name, WORLD, random, random.choice(LANGS), kind) for _ in range(count))


def everything(count: int, held_out_count: int) -> Iterator[Task]:
    for name in TASK_NAMES:
        yield from thrown(name, count)
        for kind in ("triple", "pair"):
            yield from held_out(name, kind, held_out_count)


def scenes_of(task: Task) -> list[Scene]:
    return [piece for piece in (*task.turn.prompt, *task.turn.reply) if isinstance(piece, Scene)]


def texts_of(task: Task) -> list[str]:
    return [piece for piece in (*task.turn.prompt, *task.turn.reply) if isinstance(piece, str)]


def is_right(task: Task) -> bool:
    match task.name:
        case "draw":
            return (parse(texts_of(task)[0]),) == task.scenes
        case "describe":
            return task.source is not None and task.text == describe(task.source, task.lang)
        case "edit" | "move":
            return edited(task) == task.scenes
    return answer(task) == task.text


def test_replies_follow_from_the_words() -> None:
    """Every reference has to fit exactly one thing, or the interpreter fails."""
    for task in everything(3000, 400):
        assert is_right(task), task


def test_the_interpreter_tells_wrong_replies() -> None:
    for name in ("count", "ask", "edit"):
        tasks = list(thrown(name, 200))
        swapped = [replace(task, turn=replace(task.turn, reply=other.turn.reply)) for task, other in pairwise(tasks)]
        assert sum(is_right(task) for task in swapped) < 80


def test_edits_and_almost_all_films_change_the_picture() -> None:
    assert all(task.scenes[0] != task.source for task in thrown("edit", 2000))
    films = list(thrown("move", 2000))
    assert all(len(task.scenes) == 4 for task in films)
    assert 0.01 < sum(task.scenes[0] == task.source for task in films) / len(films) < 0.1


def test_training_never_shows_or_names_what_is_held_out() -> None:
    """Also not in a question about what is absent, in any wording of either language."""
    held = [each for each in all_shapes() if is_triple_held_out(each)]
    named = [
        phrases[each].removeprefix("an ").removeprefix("a ").removeprefix("一个")
        for lang in LANGS
        for phrases in THING_PHRASES[lang]
        for each in held
    ]
    random, count = Random(7), Counter[str]()
    for _ in range(20_000):
        task = make(random.choice(TASK_NAMES), WORLD, random, random.choice(LANGS))
        count[task.name] += 1
        assert all(is_trained(scene) for scene in scenes_of(task))
        assert not any(phrase in text for text in texts_of(task) for phrase in named), task
    assert min(count[name] for name in TASK_NAMES) > 3000


def test_training_asks_in_vain_for_shapes_with_all_attributes() -> None:
    """So the test above would see a held-out one."""
    asked = [texts_of(task)[0] for task in thrown("ask", 4000) if task.form == "exists" and task.text == "no"]
    assert sum(bool(re.search(r" an? (?:small|big) \w+ \w+\?", each)) for each in asked) > 20


@pytest.mark.parametrize("name", TASK_NAMES)
def test_what_is_allowed_can_be_narrowed(name: str) -> None:
    random = Random(3)
    for _ in range(100):
        task = make(name, WORLD, random, "en", lambda scene: is_trained(scene) and scene.background != "sky")
        assert all(is_trained(scene) and scene.background != "sky" for scene in scenes_of(task))


def has(scene: Scene, kind: HeldOut) -> bool:
    return has_held_out_triple(scene) if kind == "triple" else has_held_out_pair(scene) and not has_held_out_triple(scene)


@pytest.mark.parametrize(("name", "kind"), list(product(TASK_NAMES, ("triple", "pair"))))
def test_held_out_tasks_need_the_combination(name: str, kind: HeldOut) -> None:
    forms = set()
    for task in held_out(name, kind, 300):
        forms.add(task.form)
        assert all(has(scene, kind) for scene in task.scenes or [task.source] if scene)
        if task.form in MAKING:
            assert task.source is not None
            assert is_trained(task.source)
        elif task.source is not None:
            assert has(task.source, kind)
    assert forms == FORMS[name] - {"background"}


def subjects(scene: Scene, kind: HeldOut) -> list[Thing]:
    things = [each.thing for each in scene.things]
    if kind == "triple":
        return [each for each in things if is_triple_held_out(each)]
    return [each for at, each in enumerate(things) if any(is_pair_held_out(each, other) for other in things[:at] + things[at + 1 :])]


@pytest.mark.parametrize("kind", ["triple", "pair"])
def test_held_out_questions_are_about_the_combination(kind: HeldOut) -> None:
    for task in (*held_out("ask", kind, 300), *held_out("count", kind, 300)):
        source, prompt = task.turn.prompt
        assert isinstance(source, Scene)
        only = scene_of(source.background, [each for each in source.things if each.thing in subjects(source, kind)])
        alone = replace(task, turn=replace(task.turn, prompt=(only, prompt)))
        if task.name == "ask":
            assert answer(alone) == task.text, task
        if task.form == "exists":
            said = attributes(mentioned(task), task.lang)
            missed = [sum(getattr(each, part) != value for part, value in said.items()) for each in subjects(source, kind)]
            assert min(missed) == (0 if task.text in ("yes", "有") else 1), task
        if task.form in ("of colour", "of shape"):
            assert answer(alone) != "0", task


@pytest.mark.parametrize("kind", ["triple", "pair"])
def test_held_out_movers_are_of_the_combination(kind: HeldOut) -> None:
    for task in held_out("move", kind, 300):
        assert task.source is not None
        movers = set(task.source.things) - set(task.scenes[-1].things)
        assert all(each.thing in subjects(task.source, kind) for each in movers)


def test_all_forms_come_about_equally() -> None:
    for name in TASK_NAMES:
        count = Counter(task.form for task in thrown(name, 1400))
        assert set(count) == FORMS[name]
        assert min(count.values()) > 0.7 * 1400 / len(FORMS[name])


def test_answers_are_balanced() -> None:
    found: dict[str, Counter[str]] = {}
    for task in (*thrown("ask", 6000), *thrown("count", 3000)):
        found.setdefault(task.form, Counter())[task.text if task.lang == "en" else f"zh {task.text}"] += 1
    yes, no = found["exists"]["yes"], found["exists"]["no"]
    assert 0.44 < yes / (yes + no) < 0.56
    english = {form: {text: count for text, count in each.items() if not text.startswith("zh ")} for form, each in found.items()}
    for form, numbers in (("all", "123"), ("of colour", "0123"), ("of shape", "0123")):
        total = sum(english[form].values())
        assert set(english[form]) == set(numbers)
        assert max(english[form].values()) < 0.55 * total
    assert 0.25 < english["place"]["nothing"] / sum(english["place"].values()) < 0.42


def test_prompts_are_short() -> None:
    lengths = [len(text) for task in everything(500, 0) if task.name != "draw" for text in task.turn.prompt if isinstance(text, str)]
    assert max(lengths) <= 52
    assert sum(length <= 40 for length in lengths) / len(lengths) > 0.95


@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_seed_decides_all(name: str) -> None:
    assert list(thrown(name, 50, seed=5)) == list(thrown(name, 50, seed=5))
    assert list(thrown(name, 50, seed=5)) != list(thrown(name, 50, seed=6))
    assert list(held_out(name, "pair", 20, seed=5)) == list(held_out(name, "pair", 20, seed=5))


@pytest.mark.parametrize("stamps", [(), ("cat",)])
@pytest.mark.parametrize("name", TASK_NAMES)
def test_worlds_with_few_stamps_or_none(name: str, stamps: tuple[str, ...]) -> None:
    random, world = Random(9), World(stamps)
    for lang in ("en", "zh"):
        tasks = [make(name, world, random, as_lang(lang)) for _ in range(200)]
        named = {each.thing.name for task in tasks for scene in scenes_of(task) for each in scene.things if each.thing.kind == "stamp"}
        assert named == set(stamps)


def as_lang(text: str) -> Lang:
    return "en" if text == "en" else "zh"


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(KeyError):
        make("sing", WORLD, Random(0), "en")
