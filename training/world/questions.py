"""Tasks whose answer is text: count the things of a scene, or answer a question about one of them.

Called by tasks.py through the two tables COUNTS and QUESTIONS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from training.world.forms import Maker, Throw, Turn, another
from training.world.phrases import (
    THING_PHRASES,
    WORDS,
    Mention,
    any_phrase,
    colour_answer,
    noun_phrase,
    place_phrase,
    plural,
)
from training.world.scene import COLOURS, DIGITS, MOST_THINGS, SHAPES, SIZES, Scene, Thing, free_places, scene_of
from training.world.wording import NOTHING, YES_NO, worded

_SHARE_OF_NONE = 0.25
_NUM_COUNTED = (1, 2, 3, 3, 3)
"""Things in the scenes of counts by colour or shape. With the share above, the answers 0 to 3 stand about as 25 : 46 : 21 : 8."""
_SHARE_OF_NOTHING = 1 / 3


def _count_all(throw: Throw) -> Turn | None:
    scene = throw.scene()
    return Turn((scene, worded("all", throw.lang, throw.random)), (str(len(scene.things)),))


def _count_of(throw: Throw, part: Literal["colour", "name"], form: str, values: Sequence[str]) -> Turn | None:
    """How many things have this attribute: other things are given it at random, or the chance that two share one would be small."""
    scene = _with_shared(throw, part)
    index = throw.subject(scene)
    value = getattr(scene.things[index].thing, part) if index is not None else ""
    if value not in values or not throw.rule.shows(scene):
        return None
    if not throw.rule.only_subjects and throw.random.random() < _SHARE_OF_NONE:
        value = throw.random.choice([each for each in values if all(getattr(placed.thing, part) != each for placed in scene.things)])
    said = {"colour": colour_answer(value, throw.lang)} if part == "colour" else {"shapes": plural(value, throw.lang)}
    count = sum(getattr(placed.thing, part) == value for placed in scene.things)
    return Turn((scene, worded(form, throw.lang, throw.random, **said)), (str(count),))


def _with_shared(throw: Throw, part: Literal["colour", "name"]) -> Scene:
    """Any scene, in which the first things may have got one value of this attribute. Not checked against the rule."""
    random = throw.random
    scene = throw.world.scene(random, lambda _: True, random.choice(_NUM_COUNTED))
    able = [each for each in scene.things if each.thing.kind == "shape" or (part == "colour" and each.thing.colour)]
    if len(able) < 2:
        return scene
    chosen = random.sample(able, random.randint(1, len(able)))
    value = getattr(chosen[0].thing, part)
    others = [each for each in scene.things if each not in chosen]
    given = [replace(each, thing=_given(each.thing, part, value)) for each in chosen]
    return scene_of(scene.background, [*others, *given])


def _given(thing: Thing, part: str, value: str) -> Thing:
    return replace(thing, colour=value) if part == "colour" else replace(thing, name=value)


COUNTS: Mapping[str, Maker] = {
    "all": _count_all,
    "of colour": lambda throw: _count_of(throw, "colour", "of colour", COLOURS),
    "of shape": lambda throw: _count_of(throw, "name", "of shape", SHAPES),
}


def _ask_attribute(throw: Throw, form: str, part: Literal["colour", "name", "size"]) -> Turn | None:
    scene = throw.scene()
    index = throw.subject(scene)
    if index is None:
        return None
    thing = scene.things[index].thing
    mention = throw.mention(scene, index, without=part)
    if mention is None or not getattr(thing, part) or (part == "name" and thing.kind != "shape"):
        return None
    value = getattr(thing, part)
    answer = colour_answer(value, throw.lang) if part == "colour" else WORDS[throw.lang][value]
    return Turn((scene, worded(form, throw.lang, throw.random, thing=noun_phrase(mention, throw.lang))), (answer,))


def _ask_place(throw: Throw) -> Turn | None:
    """What stands in a cell; a third of the cells are empty."""
    scene, lang = throw.scene(), throw.lang
    index = throw.subject(scene)
    if not throw.rule.only_subjects and throw.random.random() < _SHARE_OF_NOTHING:
        place, answer = throw.random.choice(free_places(scene.things, 1)), NOTHING[lang]
    elif index is not None:
        place, answer = throw.random.choice(sorted(scene.things[index].cells)), THING_PHRASES[lang][0][scene.things[index].thing]
    else:
        return None
    return Turn((scene, worded("place", lang, throw.random, place=place_phrase(*place, lang))), (answer,))


def _ask_exists(throw: Throw) -> Turn | None:
    """As often yes as no. What is asked for in vain differs in one attribute from a thing that is there."""
    scene, lang = throw.scene(), throw.lang
    index = throw.subject(scene)
    if index is None or (scene.things[index].thing.kind == "stamp" and len(throw.world.stamps) <= MOST_THINGS):
        return None  # Of so few stamps none might be absent.
    thing = scene.things[index].thing
    mention = Mention(thing.name, thing.colour, thing.size if throw.random.random() < 0.5 else "")
    is_there = throw.random.random() < 0.5
    while not is_there and (any(mention.fits(each.thing) for each in scene.things) or not _may_say(mention, throw)):
        mention = _changed(mention, thing, throw)
    return Turn((scene, worded("exists", lang, throw.random, a_thing=any_phrase(mention, lang))), (YES_NO[lang][not is_there],))


def _changed(mention: Mention, thing: Thing, throw: Throw) -> Mention:
    """Like the thing, but for one of the attributes that are mentioned."""
    pools = {"name": {"shape": SHAPES, "digit": DIGITS, "stamp": throw.world.stamps}[thing.kind], "colour": COLOURS, "size": SIZES}
    part = throw.random.choice([part for part, value in zip(Mention._fields, mention, strict=True) if value])
    like = {part: getattr(thing, part) if value else "" for part, value in zip(Mention._fields, mention, strict=True)}
    return Mention(**{**like, part: another(like[part], pools[part], throw.random)})


def _may_say(mention: Mention, throw: Throw) -> bool:
    """Only a shape has a size: with it, all three are said."""
    return not mention.size or throw.rule.may_name(Thing("shape", *mention))


def _ask_background(throw: Throw) -> Turn | None:
    scene = throw.scene()
    return Turn((scene, worded("background", throw.lang, throw.random)), (WORDS[throw.lang][scene.background],))


QUESTIONS: Mapping[str, Maker] = {
    "colour": lambda throw: _ask_attribute(throw, "colour", "colour"),
    "shape": lambda throw: _ask_attribute(throw, "shape", "name"),
    "size": lambda throw: _ask_attribute(throw, "size", "size"),
    "place": _ask_place,
    "exists": _ask_exists,
    "background": _ask_background,
}
NOT_ABOUT_THINGS = frozenset({"background"})
