"""Tasks that change a scene by an instruction: one thing's attribute or place, a thing more or less, the background; and films.

An instruction fits one thing alone and really changes the picture. Called by tasks.py through the tables EDITS and MOVES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from training.world.forms import Maker, Throw, Turn, another
from training.world.phrases import WORDS, any_phrase, colour_answer, direction_word, full_mention, noun_phrase, place_phrase
from training.world.scene import BACKGROUNDS, COLOURS, MOST_THINGS, SHAPES, SIZES, STEPS, Placed, Scene, Thing, film, free_places, scene_of
from training.world.wording import worded

FRAMES = 4
"""Frames of a film that follow the one in its prompt."""
_SHARE_OF_STILL = 0.1
"""Films without any motion that are kept: the mover stands at the border or before another thing."""


def _replaced(scene: Scene, index: int, placed: Placed) -> Scene:
    return scene_of(scene.background, [*scene.things[:index], placed, *scene.things[index + 1 :]])


def _alter(
    throw: Throw, form: str, able: Callable[[Thing], bool], change: Callable[[Throw, Thing], tuple[Thing, dict[str, str]]]
) -> Turn | None:
    """change: the altered thing, and what the wording says of it."""
    scene = throw.world.scene(throw.random, throw.rule.begins)
    index = throw.random.randrange(len(scene.things))
    thing = scene.things[index].thing
    mention = throw.mention(scene, index) if able(thing) else None
    if mention is None:
        return None
    altered, said = change(throw, thing)
    result = _replaced(scene, index, replace(scene.things[index], thing=altered))
    if not throw.rule.shows(result):
        return None
    return Turn((scene, worded(form, throw.lang, throw.random, thing=noun_phrase(mention, throw.lang), **said)), (result,))


def _in_another_colour(throw: Throw, thing: Thing) -> tuple[Thing, dict[str, str]]:
    colour = another(thing.colour, COLOURS, throw.random)
    return replace(thing, colour=colour), {"colour": colour_answer(colour, throw.lang)}


def _in_the_other_size(throw: Throw, thing: Thing) -> tuple[Thing, dict[str, str]]:
    size = another(thing.size, SIZES, throw.random)
    return replace(thing, size=size), {"size": WORDS[throw.lang][size]}


def _in_another_shape(throw: Throw, thing: Thing) -> tuple[Thing, dict[str, str]]:
    shape = another(thing.name, SHAPES, throw.random)
    return replace(thing, name=shape), {"shape": WORDS[throw.lang][shape]}


def _relocate(throw: Throw) -> Turn | None:
    scene, lang = throw.scene(), throw.lang
    index = throw.subject(scene)
    mention = throw.mention(scene, index) if index is not None else None
    if index is None or mention is None:
        return None
    placed = scene.things[index]
    others = [each for at, each in enumerate(scene.things) if at != index]
    places = [each for each in free_places(others, placed.thing.span) if each != (placed.row, placed.column)]
    if not places:
        return None
    row, column = throw.random.choice(places)
    result = _replaced(scene, index, Placed(row, column, placed.thing))
    if not throw.rule.shows(result):
        return None
    said = worded("relocate", lang, throw.random, thing=noun_phrase(mention, lang), place=place_phrase(row, column, lang))
    return Turn((scene, said), (result,))


def _remove(throw: Throw) -> Turn | None:
    scene = throw.world.scene(throw.random, throw.rule.shows, throw.random.randint(2, MOST_THINGS))
    index = throw.random.randrange(len(scene.things))
    mention = throw.mention(scene, index)
    result = Scene(scene.background, scene.things[:index] + scene.things[index + 1 :])
    if mention is None or not throw.rule.shows(result):
        return None
    return Turn((scene, worded("remove", throw.lang, throw.random, thing=noun_phrase(mention, throw.lang))), (result,))


def _add(throw: Throw) -> Turn | None:
    lang = throw.lang
    scene = throw.world.scene(throw.random, throw.rule.begins, throw.random.randint(1, MOST_THINGS - 1))
    thing = throw.world.thing(throw.random)
    places = free_places(scene.things, thing.span)
    if not places:
        return None
    row, column = throw.random.choice(places)
    result = scene_of(scene.background, [*scene.things, Placed(row, column, thing)])
    if not throw.rule.shows(result):
        return None
    phrase = any_phrase(full_mention(thing), lang)
    return Turn((scene, worded("add", lang, throw.random, a_thing=phrase, place=place_phrase(row, column, lang))), (result,))


def _set_background(throw: Throw) -> Turn | None:
    scene = throw.scene()
    background = another(scene.background, BACKGROUNDS, throw.random)
    result = Scene(background, scene.things)
    if not throw.rule.shows(result):
        return None
    return Turn((scene, worded("set background", throw.lang, throw.random, background=WORDS[throw.lang][background])), (result,))


EDITS: Mapping[str, Maker] = {
    "recolour": lambda throw: _alter(throw, "recolour", lambda thing: bool(thing.colour), _in_another_colour),
    "resize": lambda throw: _alter(throw, "resize", lambda thing: bool(thing.size), _in_the_other_size),
    "reshape": lambda throw: _alter(throw, "reshape", lambda thing: thing.kind == "shape", _in_another_shape),
    "relocate": _relocate,
    "remove": _remove,
    "add": _add,
    "set background": _set_background,
}


def _move(throw: Throw) -> Turn | None:
    scene, random, lang = throw.scene(), throw.random, throw.lang
    index = throw.subject(scene)
    mention = throw.mention(scene, index) if index is not None else None
    if index is None or mention is None or scene.things[index].thing.kind == "stamp":
        return None
    direction = random.choice(tuple(STEPS))
    frames = film(scene, index, direction, FRAMES)
    if frames[0] == scene and random.random() >= _SHARE_OF_STILL:
        return None
    if not all(throw.rule.shows(frame) for frame in frames):
        return None
    said = worded("move", lang, random, thing=noun_phrase(mention, lang), direction=direction_word(direction, lang))
    return Turn((scene, said), frames)


MOVES: Mapping[str, Maker] = {"move": _move}
