"""The world's words in English and Chinese: how a thing is said in full, how some of its attributes point at it, and how a place is said.

Builds no sentence (grammar.py) and no question (wording.py). Called by both and by the makers of tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Literal, NamedTuple

from training.data.stamps import STAMP_NAMES_ZH
from training.world.scene import COLOURS, DIGITS, SHAPES, SIZES, Direction, Thing, every_thing

Lang = Literal["en", "zh"]
LANGS: tuple[Lang, ...] = ("en", "en", "zh")
"""To choose one at random: two English tasks for every Chinese one."""

_EN = {word: word for word in (*SHAPES, *COLOURS, *SIZES, *STAMP_NAMES_ZH, "white", "grey", "sky", "sand", "up", "down", "left", "right")}
_ZH = {
    "circle": "圆",
    "square": "方块",
    "triangle": "三角",
    "star": "星",
    "heart": "心",
    "cross": "十字",
    "red": "红",
    "orange": "橙",
    "yellow": "黄",
    "green": "绿",
    "blue": "蓝",
    "purple": "紫",
    "brown": "棕",
    "black": "黑",
    "big": "大",
    "small": "小",
    "white": "白色",
    "grey": "灰色",
    "sky": "天空色",
    "sand": "沙色",
    "up": "上",
    "down": "下",
    "left": "左",
    "right": "右",
    **STAMP_NAMES_ZH,
}
WORDS: Mapping[Lang, Mapping[str, str]] = {"en": _EN, "zh": _ZH}
"""Every attribute's word, as it stands inside a phrase."""
_SYNONYMS: Mapping[Lang, Mapping[str, str]] = {
    "en": {"big": "large", "small": "little"},
    "zh": {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星星", "heart": "爱心", "cross": "十字形"},
}


class Mention(NamedTuple):
    """Some attributes of a thing, the others blank: all that fits it is meant."""

    name: str = ""
    colour: str = ""
    size: str = ""

    def fits(self, thing: Thing) -> bool:
        return (
            (not self.name or self.name == thing.name)
            and (not self.colour or self.colour == thing.colour)
            and (not self.size or self.size == thing.size)
        )


def full_mention(thing: Thing) -> Mention:
    return Mention(thing.name, thing.colour, thing.size)


def _noun_phrase(mention: Mention, lang: Lang, words: Mapping[str, str]) -> str:
    """Without article: "big red star", "digit 7", "red thing"; "大红星", "数字7", "红的东西"."""
    attributes = [words[each] for each in (mention.size, mention.colour) if each]
    if lang == "en":
        noun = f"digit {mention.name}" if mention.name in DIGITS else words[mention.name] if mention.name else "thing"
        return " ".join([*attributes, noun])
    noun = f"数字{mention.name}" if mention.name in DIGITS else words[mention.name] if mention.name else "的东西"
    return "".join([*attributes, noun])


@cache
def noun_phrase(mention: Mention, lang: Lang) -> str:
    """What stands behind "the"; in Chinese, without articles, the whole phrase."""
    return _noun_phrase(mention, lang, WORDS[lang])


@cache
def any_phrase(mention: Mention, lang: Lang) -> str:
    """With the indefinite article: "a big red star", "an orange circle"; in Chinese none."""
    return _any(noun_phrase(mention, lang)) if lang == "en" else noun_phrase(mention, lang)


def _any(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def place_phrase(row: int, column: int, lang: Lang) -> str:
    """row, column: from 0; in words they count from 1."""
    return f"row {row + 1}, column {column + 1}" if lang == "en" else f"第{row + 1}行第{column + 1}列"


def colour_answer(colour: str, lang: Lang) -> str:
    """A colour that stands alone."""
    return colour if lang == "en" else f"{_ZH[colour]}色"


def direction_word(direction: Direction, lang: Lang) -> str:
    return WORDS[lang][direction]


def plural(shape: str, lang: Lang) -> str:
    if lang == "zh":
        return _ZH[shape]
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _reworded(thing: Thing, lang: Lang) -> str:
    noun = _noun_phrase(full_mention(thing), lang, {**WORDS[lang], **_SYNONYMS[lang]})
    if lang == "en":
        return _any(noun)
    return noun if thing.kind == "stamp" else f"一个{noun}"  # every stamp would want a measure word of its own


THING_PHRASES: Mapping[Lang, tuple[Mapping[Thing, str], ...]] = {
    lang: (
        {thing: any_phrase(full_mention(thing), lang) for thing in every_thing(tuple(STAMP_NAMES_ZH))},
        {thing: _reworded(thing, lang) for thing in every_thing(tuple(STAMP_NAMES_ZH))},
    )
    for lang in WORDS
}
"""Every thing in full: first as a model answers, then with synonyms."""
