"""What a recipe learns from: which pictures are kept from it, and documents of every source a mix can name. No package is opened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from service.model.vq import VQTokenizer
from tests.training.test_picture import TINY
from training.data.emoji import Emoji, EmojiSet
from training.data.split import is_held_out
from training.data.text import TextSet
from training.materials import PICTURE_HELD_OUT_SHARE, HeldOutTask, Materials, Streams, open_streams, vocabulary_texts
from training.picture.measures import encode
from training.recipe import SOURCES, Recipe, read_recipe
from training.stream.document import Document
from training.tokens import train_tokenizer
from training.world.draw import Brush
from training.world.scene import Scene, World, has_held_out_pair, has_held_out_triple, is_trained
from training.world.tasks import TASK_NAMES

STYLES = ("noto", "twemoji")
COUNT = 80
CHOSEN = tuple(range(0, COUNT, 4))


def emoji() -> EmojiSet:
    entries = tuple(
        Emoji(f"1f{index:03x}", f"thing {index}", ("some", f"tag{index}"), f"东西{index}", ("有", "用"), "Objects", "tool", 1.0)
        for index in range(COUNT)
    )
    random = np.random.default_rng(0)
    pictures = {style: random.integers(256, size=(COUNT, 32, 32, 3), dtype=np.uint8) for style in STYLES}
    present = {style: np.ones(COUNT, dtype=np.bool_) for style in STYLES}
    present["twemoji"][1] = False
    return EmojiSet(entries, pictures, present)


def recipe() -> Recipe:
    found = read_recipe("smoke")
    data = replace(found.data, styles=STYLES, memory_styles=STYLES, memory_count=len(CHOSEN), texts=("wikipedia",), num_watched=30)
    return replace(found, data=data, tokenizer=replace(found.tokenizer, model=TINY))


@pytest.fixture(scope="module", autouse=True)
def _fewer_sentences() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.materials.NUM_SENTENCES", 2000)
        yield


@pytest.fixture(scope="module")
def materials() -> Materials:
    found = Materials(recipe().data, World(), Brush({}), emoji(), CHOSEN)
    words = [f"The {index}th article is about {index * index} things. " * 8 for index in range(40)]
    found.__dict__["texts"] = TextSet(words, ["Held out: nobody learns this line, which is about quartz. " * 20])
    return found


@pytest.fixture(scope="module")
def streams(materials: Materials) -> Streams:
    torch.manual_seed(0)
    vocabulary = train_tokenizer(vocabulary_texts(materials), 320)
    return open_streams(recipe(), materials, vocabulary, VQTokenizer(TINY).eval())


def test_pictures_are_learned_or_kept_away(materials: Materials) -> None:
    learned, watched = materials.pictures(is_watched=False), materials.pictures(is_watched=True)
    assert len(learned) + len(watched) == 2 * COUNT - 1  # one style lacks one
    kept = [index for index, each in enumerate(materials.emoji.entries) if is_held_out(each.key, PICTURE_HELD_OUT_SHARE, "picture")]
    assert set(kept) - set(CHOSEN)
    wanted = [materials.emoji.pictures[style][index] for style in STYLES for index in kept if index not in CHOSEN]
    assert sorted(each.tobytes() for each in watched) == sorted(each.tobytes() for each in wanted)
    assert not {each.tobytes() for each in learned} & {each.tobytes() for each in watched}


def test_what_is_watched_has_combinations_that_are_never_trained(materials: Materials) -> None:
    scenes = materials.brush.read(materials.watched_pictures()[-30:])
    assert len(scenes) == 30
    assert not any(is_trained(scene) for scene in scenes)


def test_the_vocabulary_sees_prompts_names_and_texts(materials: Materials) -> None:
    texts = list(vocabulary_texts(materials))
    assert {"thing 4, noto style", "东西4，推特风格", "some, tag7", "有，用"} <= set(texts)
    assert set(materials.texts.train) & set(texts)
    assert not set(materials.texts.held_out) & set(texts)
    assert any("red" in text for text in texts)
    assert any("红" in text for text in texts)


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_throws_and_is_watched(streams: Streams, name: str) -> None:
    documents = list(streams.mix({name: 1.0})(np.random.default_rng(0), 2000))
    again = list(streams.mix({name: 1.0})(np.random.default_rng(0), 2000))
    assert sum(len(each.ids) for each in documents) >= 2000
    assert all(np.array_equal(one.ids, other.ids) for one, other in zip(documents, again, strict=True))
    watched = streams.watched({name: 1.0})[name]
    assert len(watched) == 30
    for document in [*documents, *watched]:
        assert document.is_target.any()
        assert not document.is_target[0]
        assert document.ids.max() < 320 + TINY.num_codes


@pytest.mark.parametrize("name", ["text", *(f"world_{name}" for name in TASK_NAMES), "world_pictures", "world_films"])
def test_what_is_watched_is_thrown_from_what_is_never_trained(streams: Streams, name: str) -> None:
    random = np.random.default_rng(1)
    learned, watched = streams._makers()[name](), streams._held_out_makers()[name]()
    for source, is_watched in ((learned, False), (watched, True)):
        for _ in range(12):
            thrown = source(random)
            if isinstance(thrown, Document):
                text = streams.scribe.tokenizer.decode(thrown.ids.tolist())
                assert ("quartz" in text) == is_watched
                continue
            scenes = [piece for piece in (*thrown.prompt, *thrown.reply) if isinstance(piece, Scene)]
            assert is_watched != all(is_trained(scene) for scene in scenes)


def test_a_mix_has_its_shares(streams: Streams) -> None:
    documents = streams.mix({"world_draw": 3.0, "emoji_read": 1.0, "text": 0.0})(np.random.default_rng(0), 40_000)
    kinds = [document.kind for document in documents]
    assert "text" not in kinds
    assert kinds.count("world_draw") / len(kinds) == pytest.approx(0.75, abs=0.08)


def test_memory_draws_pictures_as_they_are_and_leaves_pairs_out(streams: Streams, materials: Materials) -> None:
    memory = streams.memory
    assert {place for place, _ in memory.pairs} | {place for place, _ in memory.held_out} == set(CHOSEN)
    assert not set(memory.pairs) & set(memory.held_out)
    place, style = memory.pairs[0]
    assert np.array_equal(memory.codes[style][place], encode(streams.vq, materials.emoji.pictures[style][place][None])[0])


def test_held_out_tasks_of_the_world_need_what_was_never_trained() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        talk = HeldOutTask("draw", World())(random)
        scenes = [piece for piece in talk.reply if isinstance(piece, Scene)]
        assert all(has_held_out_triple(scene) or has_held_out_pair(scene) for scene in scenes)
        assert len(scenes) == 1


def test_an_unknown_source_is_an_error(streams: Streams) -> None:
    with pytest.raises(KeyError, match="world_fly"):
        streams.mix({"world_fly": 1.0})


def test_scenes_are_drawn_in_the_recipes_size(materials: Materials) -> None:
    large = replace(materials, recipe=replace(materials.recipe, size=64, styles=()), emoji=EmojiSet((), {}, {}))
    assert large.draw([World().scene(Random(0))]).shape == (1, 64, 64, 3)
    assert large.watched_pictures().shape == (30, 64, 64, 3)
