"""A scene as a sentence in English or Chinese, in many wordings, and any of these sentences as a scene again.

Sentences here are full descriptions; questions and instructions are wording.py's. Called by the makers of tasks and by the judge.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from random import Random

from training.world.phrases import THING_PHRASES, WORDS, Lang, place_phrase
from training.world.scene import BACKGROUNDS, MOST_THINGS, Placed, Scene, Thing, scene_of

# The first item, join and frame of each language make the sentence that a model answers with.
_ITEMS: Mapping[Lang, tuple[str, ...]] = {
    "en": ("{thing} in {place}", "{thing} at {place}", "{place}: {thing}", "in {place} {thing}"),
    "zh": ("{place}有{thing}", "{place}{thing}", "{thing}在{place}"),
}
_JOINS: Mapping[Lang, tuple[str, ...]] = {"en": (", ", "; ", " and "), "zh": ("，", "；")}
_FRAMES: Mapping[Lang, tuple[str, ...]] = {
    "en": ("{things}, on {background}", "on {background}: {things}", "{things}, {background} background"),
    "zh": ("{things}，{background}背景", "{background}背景，{things}", "在{background}背景上，{things}"),
}
_REQUESTS: Mapping[Lang, tuple[str, ...]] = {"en": ("{}", "Draw {}.", "Paint {}."), "zh": ("{}", "画：{}。", "请画：{}。")}
_PLAIN_SHARE = 0.5
"""Of requests in the words of an answer, so that both directions of a sentence are seen most."""

_PLACE_EN, _PLACE_ZH = r"row (?P<row{0}>[1-4]), column (?P<column{0}>[1-4])", r"第(?P<row{0}>[1-4])行第(?P<column{0}>[1-4])列"
_ITEM: Mapping[Lang, re.Pattern[str]] = {
    "en": re.compile(
        rf"(?:(?P<thing1>an? [a-z0-9 ]+?) (?:in|at) {_PLACE_EN.format(1)}|(?:in |at )?{_PLACE_EN.format(2)}:? (?P<thing2>an? [a-z0-9 ]+?))"
        r"(?:, and |, |; | and |$)"
    ),
    "zh": re.compile(rf"(?:(?P<thing1>[^,;:第]+?)在{_PLACE_ZH.format(1)}|{_PLACE_ZH.format(2)}有?(?P<thing2>[^,;:第在有]+?))(?:[,;]|$)"),
}
_BACKGROUND_NAMES: Mapping[Lang, Mapping[str, str]] = {lang: {words[name]: name for name in BACKGROUNDS} for lang, words in WORDS.items()}
_NAMES_EN, _NAMES_ZH = ("|".join(names) for names in _BACKGROUND_NAMES.values())
_FRAME: Mapping[Lang, tuple[re.Pattern[str], ...]] = {
    "en": (
        re.compile(rf"(?:draw |paint )?(?P<things>.+), (?:on (?P<on>{_NAMES_EN})|(?P<background>{_NAMES_EN}) background)"),
        re.compile(rf"(?:draw |paint )?on (?P<on>{_NAMES_EN}): (?P<things>.+)"),
    ),
    "zh": (
        re.compile(rf"(?:请?画:)?(?P<things>.+),(?P<background>{_NAMES_ZH})背景"),
        re.compile(rf"(?:请?画:)?(?:在(?P<on>{_NAMES_ZH})背景上|(?P<background>{_NAMES_ZH})背景),(?P<things>.+)"),
    ),
}
_THINGS: Mapping[Lang, Mapping[str, Thing]] = {
    lang: {phrase: thing for phrases in wordings for thing, phrase in phrases.items()} for lang, wordings in THING_PHRASES.items()
}


def describe(scene: Scene, lang: Lang) -> str:
    """The one sentence that a model answers with: things in reading order, then the background. Raises: KeyError for an unknown stamp."""
    phrases = THING_PHRASES[lang][0]
    return _sentence(scene.background, [_item(each, lang, phrases, 0) for each in scene.things], lang, (0, 0))


def request(scene: Scene, lang: Lang, random: Random) -> str:
    """The scene in the words of somebody who wants to see it: one of many wordings, half of them as `describe` has it."""
    sentence = describe(scene, lang) if random.random() < _PLAIN_SHARE else _reworded(scene, lang, random)
    return random.choice(_REQUESTS[lang]).format(sentence)


def parse(sentence: str) -> Scene | None:
    """The scene that a sentence of `describe` or `request` tells, in either language and with its things in any order.

    None when it is no full description: unknown words, no background, no things or more than three, two in one cell.
    """
    text = " ".join(unicodedata.normalize("NFKC", sentence).lower().split()).strip(" .。")
    lang: Lang = "zh" if "行" in text else "en"
    for frame in _FRAME[lang]:
        if found := frame.fullmatch(text):
            groups = found.groupdict()
            name = groups["on"] if groups.get("on") else groups["background"]
            return _checked(_BACKGROUND_NAMES[lang][name], _read_things(groups["things"], lang))
    return None


def _item(placed: Placed, lang: Lang, phrases: Mapping[Thing, str], form: int) -> str:
    return _ITEMS[lang][form].format(thing=phrases[placed.thing], place=place_phrase(placed.row, placed.column, lang))


def _sentence(background: str, items: Sequence[str], lang: Lang, form: tuple[int, int]) -> str:
    """form: places in the tables of joins and frames."""
    join, frame = form
    return _FRAMES[lang][frame].format(things=_JOINS[lang][join].join(items), background=WORDS[lang][background])


def _reworded(scene: Scene, lang: Lang, random: Random) -> str:
    things = random.sample(scene.things, len(scene.things))
    phrases, form = random.choice(THING_PHRASES[lang]), random.randrange(len(_ITEMS[lang]))
    items = [_item(each, lang, phrases, form) for each in things]
    return _sentence(scene.background, items, lang, (random.randrange(len(_JOINS[lang])), random.randrange(len(_FRAMES[lang]))))


def _read_things(text: str, lang: Lang) -> list[Placed] | None:
    """None at the first word that is out of place, and for a list that goes on behind its last thing."""
    if text != text.rstrip(" ,;"):
        return None
    placed, position = [], 0
    while position < len(text):
        found = _ITEM[lang].match(text, position)
        side = "1" if found and found["thing1"] else "2"
        thing = _THINGS[lang].get(found["thing" + side]) if found else None
        if found is None or thing is None:
            return None
        placed.append(Placed(int(found["row" + side]) - 1, int(found["column" + side]) - 1, thing))
        position = found.end()
    return placed


def _checked(background: str, things: list[Placed] | None) -> Scene | None:
    if not things or len(things) > MOST_THINGS:
        return None
    if any(each.row % each.thing.span or each.column % each.thing.span for each in things):
        return None
    if len(frozenset().union(*(each.cells for each in things))) < sum(each.thing.span**2 for each in things):
        return None
    return scene_of(background, things)
