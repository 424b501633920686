"""A world with stamps, made without any download, and an interpreter of the world's prompts that knows only their words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np

from training.data.stamps import STAMP_NAMES_ZH
from training.world.draw import STAMP_PIXELS, Brush
from training.world.phrases import Lang
from training.world.scene import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    SHAPES,
    SIZES,
    STEPS,
    Placed,
    Scene,
    Thing,
    World,
    scene_of,
)
from training.world.tasks import Task

WORLD = World(tuple(STAMP_NAMES_ZH))


def brush() -> Brush:
    """Stamps are rough random mosaics, half of them see-through."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (len(STAMP_NAMES_ZH), 4, 4, 4), dtype=np.uint8)
    coarse[..., 3] = np.where(coarse[..., 3] < 128, 0, 255)
    fine = coarse.repeat(STAMP_PIXELS // 4, axis=1).repeat(STAMP_PIXELS // 4, axis=2)
    return Brush(dict(zip(STAMP_NAMES_ZH, fine, strict=True)))


BRUSH = brush()

ZH = {
    **dict(zip(SHAPES, ("圆", "方块", "三角", "星", "心", "十字"), strict=True)),
    **dict(zip(COLOURS, "红橙黄绿蓝紫棕黑", strict=True)),
    **dict(zip(SIZES, "小大", strict=True)),
    **dict(zip(BACKGROUNDS, ("白色", "灰色", "天空色", "沙色"), strict=True)),
    **dict(zip(STEPS, "上下左右", strict=True)),
    **STAMP_NAMES_ZH,
}
WORDS = {"en": {name: name for name in ZH}, "zh": ZH}
NAMES = (*SHAPES, *STAMP_NAMES_ZH)


def attributes(phrase: str, lang: Lang) -> dict[str, str]:
    """What a noun phrase says, in either language, with or without article."""
    said: dict[str, str] = {}
    rest = re.sub(r"^(?:an?|the) ", "", phrase)
    for part, values in (("size", SIZES), ("colour", COLOURS)):
        for value in values:
            word = WORDS[lang][value]
            if rest.startswith(word):
                said[part], rest = value, rest[len(word) :].strip()
                break
    if rest not in ("thing", "的东西"):
        digit = re.fullmatch(r"(?:digit |数字)(\d)", rest)
        said["name"] = digit[1] if digit else next(name for name in NAMES if WORDS[lang][name] == rest)
    return said


def fitting(scene: Scene, phrase: str, lang: Lang) -> list[int]:
    said = attributes(phrase, lang)
    return [at for at, each in enumerate(scene.things) if all(getattr(each.thing, part) == value for part, value in said.items())]


def the_one(scene: Scene, phrase: str, lang: Lang) -> int:
    """Fails unless exactly one thing is meant."""
    (index,) = fitting(scene, phrase, lang)
    return index


def full_thing(phrase: str, lang: Lang) -> Thing:
    said = attributes(phrase, lang)
    kind = "digit" if said["name"] in DIGITS else "shape" if said["name"] in SHAPES else "stamp"
    return Thing(kind, said["name"], said.get("colour", ""), said.get("size", ""))


def word_for(values: tuple[str, ...], word: str, lang: Lang) -> str:
    bare = word.removesuffix("色") if lang == "zh" and values == COLOURS else word
    return next(value for value in values if WORDS[lang][value] == bare)


PLACE = {"en": r"row (\d), column (\d)", "zh": r"第(\d)行第(\d)列"}
QUESTIONS = {
    "all": r"How many things\?|Count the things\.|有几个东西？|数一数东西。",
    "of colour": r"(?:How many|Count the) (\w+) things[?.]|(?:有几个|数一数)(.+色)的(?:东西)?[？。]",
    "of shape": r"(?:How many|Count the) (?:(cross)es|(\w+)s)[?.]|(?:有几个|数一数)(.+?)[？。]",
    "colour": r"What colou?r is the (.+)\?|(.+?)是?什么颜色？",
    "shape": r"(?:What|Which) shape is the (.+)\?|(.+?)是?什么形状？",
    "size": r"(?:What size|How big) is the (.+)\?|(.+?)(?:是大是小|有多大)？",
    "exists": r"(?:Is there|Do you see) (an? .+)\?|有(?:没有)?(.+?)吗?？",
    "background": r"(?:What is the|Which) background\?|(?:背景是什么|什么背景)？",
}
EDITS = {
    "recolour": r"(?:Make|Paint) the (.+) (\w+)\.|把(.+?)[变涂]成(.+)。",
    "resize": r"(?:Make|Turn) the (.+) (\w+)\.|[把让](.+?)变(.+)。",
    "reshape": r"(?:Turn the (.+) into|Make the (.+?)) a (\w+)\.|把(.+?)[变换]成(.+)。",
    "relocate": rf"(?:Move|Put) the (.+) (?:to|in) {PLACE['en']}\.|把(.+?)[移放]到{PLACE['zh']}。",
    "remove": r"Remove the (.+)\.|Take the (.+) away\.|(?:去掉|拿走)(.+)。",
    "add": rf"(?:Add|Put) (an? .+) in {PLACE['en']}\.|在{PLACE['zh']}(?:加上|放)(.+)。",
    "set background": r"(?:Make|Change) the background (?:to )?(\w+)\.|(?:把背景变|背景换)成(.+)。",
    "move": r"The (.+) (?:moves|goes) (\w+)\.|(.+?)[向往](.)(?:移动|走)。",
}


def parts(pattern: str, prompt: str) -> list[str]:
    found = re.fullmatch(pattern, prompt)
    assert found, (pattern, prompt)
    return [each for each in found.groups() if each is not None]


def mentioned(task: Task) -> str:
    """What a question of existence asks for."""
    (said,) = parts(QUESTIONS["exists"], str(task.turn.prompt[1]))
    return said


def answer(task: Task) -> str:
    """The answer to a task of counting or asking, worked out from the prompt's words and scene alone."""
    scene, prompt = task.turn.prompt
    assert isinstance(scene, Scene)
    assert isinstance(prompt, str)
    lang, things = task.lang, [each.thing for each in scene.things]
    if task.form == "place":
        row, column = (int(each) - 1 for each in re.findall(r"\d", prompt))
        here = [each.thing for each in scene.things if (row, column) in each.cells]
        return phrase(here[0], lang) if here else {"en": "nothing", "zh": "没有"}[lang]
    said = parts(QUESTIONS[task.form], prompt)
    match task.form:
        case "all":
            return str(len(things))
        case "of colour":
            return str(sum(each.colour == word_for(COLOURS, said[0], lang) for each in things))
        case "of shape":
            return str(sum(each.name == word_for(SHAPES, said[0], lang) for each in things))
        case "exists":
            return {"en": ("no", "yes"), "zh": ("没有", "有")}[lang][bool(fitting(scene, said[0], lang))]
        case "background":
            return WORDS[lang][scene.background]
    thing = things[the_one(scene, said[0], lang)]
    value = getattr(thing, {"shape": "name"}.get(task.form, task.form))
    return f"{WORDS[lang][value]}色" if (lang, task.form) == ("zh", "colour") else WORDS[lang][value]


def phrase(thing: Thing, lang: Lang) -> str:
    words = [WORDS[lang][each] for each in (thing.size, thing.colour) if each]
    noun = {"en": "digit ", "zh": "数字"}[lang] + thing.name if thing.kind == "digit" else WORDS[lang][thing.name]
    if lang == "zh":
        return "".join([*words, noun])
    return ("an " if (words or [noun])[0] == "orange" else "a ") + " ".join([*words, noun])


def edited(task: Task) -> tuple[Scene, ...]:
    """The scenes that an instruction leads to, worked out from the prompt's words and scene alone."""
    scene, prompt = task.turn.prompt
    assert isinstance(scene, Scene)
    assert isinstance(prompt, str)
    said = parts(EDITS[task.form], prompt)
    if task.form == "set background":
        return (Scene(word_for(BACKGROUNDS, said[0], task.lang), scene.things),)
    if task.form == "add":
        numbers, words = [int(each) - 1 for each in said if each.isdigit()], [each for each in said if not each.isdigit()]
        return (scene_of(scene.background, [*scene.things, Placed(*numbers, full_thing(words[0], task.lang))]),)
    index = the_one(scene, said[0], task.lang)
    if task.form == "move":
        return tuple(filmed(scene, scene.things[index], next(step for step in STEPS if WORDS[task.lang][step] == said[1])))
    others = [each for at, each in enumerate(scene.things) if at != index]
    return (scene_of(scene.background, [*others, *changed(scene.things[index], task, said)]),)


def changed(placed: Placed, task: Task, said: list[str]) -> list[Placed]:
    thing = placed.thing
    match task.form:
        case "remove":
            return []
        case "relocate":
            return [Placed(int(said[1]) - 1, int(said[2]) - 1, thing)]
        case "recolour":
            thing = replace(thing, colour=word_for(COLOURS, said[1], task.lang))
        case "resize":
            thing = replace(thing, size=word_for(SIZES, said[1], task.lang))
        case "reshape":
            thing = replace(thing, name=word_for(SHAPES, said[1], task.lang))
    return [replace(placed, thing=thing)]


def filmed(scene: Scene, mover: Placed, direction: str) -> Iterator[Scene]:
    """Four frames, step by step in plain arithmetic."""
    others = [each for each in scene.things if each != mover]
    taken = {cell for each in others for cell in each.cells}
    down, right = STEPS[direction]  # type: ignore[index]
    for _ in range(4):
        target = (mover.row + down, mover.column + right)
        if target in product(range(4), range(4)) and target not in taken:
            mover = replace(mover, row=target[0], column=target[1])
        yield scene_of(scene.background, [*others, mover])
