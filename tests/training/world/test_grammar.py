"""Sentences of scenes: there and back, in every wording, and never read as more than they say."""

from __future__ import annotations

from itertools import chain
from random import Random

import pytest

from tests.training.world.stand import WORLD
from training.world.grammar import describe, parse, request
from training.world.phrases import LANGS, THING_PHRASES, Lang
from training.world.scene import Placed, Scene, Thing, World

SCENE = Scene(
    "sand",
    (
        Placed(0, 1, Thing("shape", "star", "red", "big")),
        Placed(1, 3, Thing("digit", "7", "orange")),
        Placed(2, 0, Thing("stamp", "cat")),
    ),
)
EN = "a big red star in row 1, column 2, an orange digit 7 in row 2, column 4, a cat in row 3, column 1, on sand"
ZH = "第1行第2列有大红星，第2行第4列有橙数字7，第3行第1列有猫，沙色背景"


def scenes(seed: int, count: int, world: World = WORLD) -> list[Scene]:
    random = Random(seed)
    return [world.scene(random, lambda _: True) for _ in range(count)]


@pytest.mark.parametrize(("lang", "sentence"), [("en", EN), ("zh", ZH)])
def test_the_canonical_sentence(lang: Lang, sentence: str) -> None:
    assert describe(SCENE, lang) == sentence
    assert parse(sentence) == SCENE


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_descriptions_are_read_back(lang: Lang) -> None:
    for scene in scenes(1, 1500):
        assert parse(describe(scene, lang)) == scene


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_requests_are_read_back_in_every_wording(lang: Lang) -> None:
    random = Random(2)
    for scene in scenes(3, 1500):
        sentence = request(scene, lang, random)
        assert parse(sentence) == scene, sentence
    assert len({request(SCENE, lang, random) for _ in range(3000)}) > 300


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_half_of_the_requests_have_the_words_of_an_answer(lang: Lang) -> None:
    random = Random(4)
    plain = sum(describe(SCENE, lang) in request(SCENE, lang, random) for _ in range(2000))
    assert 900 < plain < 1150


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_no_two_things_share_a_phrase(lang: Lang) -> None:
    said = {(phrase, thing) for phrases in THING_PHRASES[lang] for thing, phrase in phrases.items()}
    assert len({phrase for phrase, _ in said}) == len(said)
    assert len({thing for _, thing in said}) == 6 * 8 * 2 + 10 * 8 + 16


def test_a_missing_word_is_noticed() -> None:
    words = EN.split()
    for at in range(len(words)):
        assert parse(" ".join([*words[:at], *words[at + 1 :]])) != SCENE


def test_a_missing_letter_is_noticed_in_chinese() -> None:
    """But for the word that a wording leaves out."""
    for at, letter in enumerate(ZH):
        if letter != "有":
            assert parse(ZH[:at] + ZH[at + 1 :]) != SCENE


@pytest.mark.parametrize("text", [EN.upper(), f"  {EN}.\n", EN.replace(", ", ",  "), f"Draw {EN}.", ZH.replace("，", ","), f"画：{ZH}。"])
def test_case_width_and_spaces_do_not_count(text: str) -> None:
    assert parse(text) == SCENE


def test_any_order_is_read() -> None:
    text = "on sand: row 3, column 1: a cat; row 1, column 2: a large red star; row 2, column 4: an orange digit 7"
    assert parse(text) == SCENE
    assert parse("在沙色背景上，猫在第3行第1列；一个橙数字7在第2行第4列；第1行第2列有一个大红星星") == SCENE


STAR = "a big red star in row 1, column 2"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "on sand",
        "沙色背景",
        STAR,
        f"{STAR}, on red",
        f"{STAR}, on sand, on sand",
        f"on sand: {STAR}, on sand",
        f"{STAR}, on sand, please",
        f"{STAR} {STAR}, on sand",
        f"{STAR}, a cat in row 1, column 1, on sand",
        f"{STAR}, {STAR}, on sand",
        "a red star in row 1, column 2, on sand",
        "a big star in row 1, column 2, on sand",
        "a big red cat in row 1, column 1, on sand",
        "a cat in row 2, column 1, on sand",
        "a big red star in row 5, column 2, on sand",
        "a big red star in row 0, column 2, on sand",
        "an big red star in row 1, column 2, on sand",
        ", ".join(f"a big red star in row {row}, column 1" for row in (1, 2, 3, 4)) + ", on sand",
        "第1行第2列有红星，沙色背景",
        "第1行第2列有大红星，沙色背景，沙色背景",
        "第1行第2列有大红星，第1行第2列有小红星，沙色背景",
        "第1行第2列有大红星",
        "第5行第2列有大红星，沙色背景",
        "第1行第2列有a big red star，沙色背景",
    ],
)
def test_what_is_no_full_description_is_not_read(text: str) -> None:
    assert parse(text) is None


def test_two_thirds_are_english() -> None:
    assert sorted(chain(LANGS)) == ["en", "en", "zh"]
