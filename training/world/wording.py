"""How each form of task is worded, in English and Chinese: short prompts, one to three wordings each.

Only tables of words with named places in them. Called by the makers of tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from training.world.phrases import Lang

_WORDINGS: Mapping[str, Mapping[Lang, tuple[str, ...]]] = {
    "describe": {"en": ("Describe.", "Describe the picture.", "What is in the picture?"), "zh": ("描述。", "描述图片。", "图里有什么？")},
    # count
    "all": {"en": ("How many things?", "Count the things."), "zh": ("有几个东西？", "数一数东西。")},
    "of colour": {
        "en": ("How many {colour} things?", "Count the {colour} things."),
        "zh": ("有几个{colour}的东西？", "数一数{colour}的东西。"),
    },
    "of shape": {"en": ("How many {shapes}?", "Count the {shapes}."), "zh": ("有几个{shapes}？", "数一数{shapes}。")},
    # ask
    "colour": {"en": ("What colour is the {thing}?", "What color is the {thing}?"), "zh": ("{thing}是什么颜色？", "{thing}什么颜色？")},
    "shape": {"en": ("What shape is the {thing}?", "Which shape is the {thing}?"), "zh": ("{thing}是什么形状？", "{thing}什么形状？")},
    "size": {"en": ("What size is the {thing}?", "How big is the {thing}?"), "zh": ("{thing}是大是小？", "{thing}有多大？")},
    "place": {"en": ("What is in {place}?", "What is at {place}?"), "zh": ("{place}有什么？", "{place}是什么？")},
    "exists": {"en": ("Is there {a_thing}?", "Do you see {a_thing}?"), "zh": ("有{a_thing}吗？", "有没有{a_thing}？")},
    "background": {"en": ("What is the background?", "Which background?"), "zh": ("背景是什么？", "什么背景？")},
    # edit
    "recolour": {
        "en": ("Make the {thing} {colour}.", "Paint the {thing} {colour}."),
        "zh": ("把{thing}变成{colour}。", "把{thing}涂成{colour}。"),
    },
    "resize": {"en": ("Make the {thing} {size}.", "Turn the {thing} {size}."), "zh": ("把{thing}变{size}。", "让{thing}变{size}。")},
    "reshape": {
        "en": ("Turn the {thing} into a {shape}.", "Make the {thing} a {shape}."),
        "zh": ("把{thing}变成{shape}。", "把{thing}换成{shape}。"),
    },
    "relocate": {
        "en": ("Move the {thing} to {place}.", "Put the {thing} in {place}."),
        "zh": ("把{thing}移到{place}。", "把{thing}放到{place}。"),
    },
    "remove": {"en": ("Remove the {thing}.", "Take the {thing} away."), "zh": ("去掉{thing}。", "拿走{thing}。")},
    "add": {"en": ("Add {a_thing} in {place}.", "Put {a_thing} in {place}."), "zh": ("在{place}加上{a_thing}。", "在{place}放{a_thing}。")},
    "set background": {
        "en": ("Make the background {background}.", "Change the background to {background}."),
        "zh": ("把背景变成{background}。", "背景换成{background}。"),
    },
    # move
    "move": {
        "en": ("The {thing} moves {direction}.", "The {thing} goes {direction}."),
        "zh": ("{thing}向{direction}移动。", "{thing}往{direction}走。"),
    },
}
YES_NO: Mapping[Lang, tuple[str, str]] = {"en": ("yes", "no"), "zh": ("有", "没有")}
NOTHING: Mapping[Lang, str] = {"en": "nothing", "zh": "没有"}


def worded(form: str, lang: Lang, random: Random, **places: str) -> str:
    """One of the form's wordings, its places filled."""
    return random.choice(_WORDINGS[form][lang]).format(**places)
