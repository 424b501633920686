"""What a recipe's stages learn from, opened once: emoji, the world, text, and the mixes of documents made of them.

Trains nothing. Called by the stages in every rank, and by evaluation, which so sees the same splits.
Shape suffixes: N pictures, S pixels of a side, R rows and W columns of codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from random import Random

import numpy as np
import tokenizers
from numpy.typing import NDArray

from service.model.vq import VQTokenizer
from training.data.emoji import EmojiSet, Pixels, load_emoji
from training.data.memory import memory_subset
from training.data.split import is_held_out
from training.data.stamps import load_stamps
from training.data.text import TextSet, load_text
from training.picture.measures import encode
from training.picture.source import draw_scenes
from training.recipe import DataRecipe, Recipe
from training.stream.document import Codes, Document, Scribe, Talk
from training.stream.sources import Memory, MemoryDraw, MemoryRead, Source, Text, WeightedMix, Wordless, WorldTask, talk_of, text_stream
from training.world.draw import Brush
from training.world.forms import HeldOut
from training.world.phrases import LANGS
from training.world.scene import Scene, World, is_trained
from training.world.tasks import TASK_NAMES, TaskName, make, make_held_out

PICTURE_HELD_OUT_SHARE = 0.05
WATCH_SEED = 2**31 - 1
"""Of held-out documents: no step of training throws from it."""
NUM_SENTENCES = 20_000
TEXT_SHARE = 2.0
"""Of plain text to everything else in what the vocabulary is learned from, in characters."""
NAME_COPIES = 4
KINDS: tuple[HeldOut, ...] = ("triple", "pair")


@dataclass(frozen=True, eq=False)
class Materials:
    """world, brush: with stamps if the recipe has them. emoji: every style of the recipe; chosen: places in its entries of those that are
    memorised."""

    recipe: DataRecipe
    world: World
    brush: Brush
    emoji: EmojiSet
    chosen: tuple[int, ...]

    @cached_property
    def texts(self) -> TextSet:
        return load_text(self.recipe.texts) if self.recipe.texts else TextSet([], [])

    def draw(self, scenes: Sequence[Scene]) -> Pixels:
        """uint8 [N, S, S, 3] in the recipe's size."""
        return draw_scenes(self.brush, scenes, self.recipe.size)

    def pictures(self, *, is_watched: bool) -> Pixels:
        """Emoji [N, S, S, 3] of all styles that the image tokenizer learns, or those that are kept from it (never a memorised one)."""
        chosen = set(self.chosen)
        kept = np.array(
            [
                is_held_out(each.key, PICTURE_HELD_OUT_SHARE, "picture") and place not in chosen
                for place, each in enumerate(self.emoji.entries)
            ],
            dtype=np.bool_,
        )
        side = self.recipe.size
        parts = [pictures[self.emoji.present[style] & (kept == is_watched)] for style, pictures in self.emoji.pictures.items()]
        return np.concatenate([*parts, np.empty((0, side, side, 3), dtype=np.uint8)])

    def watched_pictures(self) -> Pixels:
        """num_watched emoji kept from the image tokenizer, evenly chosen, and as many scenes of combinations that are never trained."""
        count = self.recipe.num_watched
        emoji = self.pictures(is_watched=True)
        random = Random(WATCH_SEED)
        scenes = [self.world.scene(random, lambda scene: not is_trained(scene)) for _ in range(count)]
        return np.concatenate([emoji[:: max(1, len(emoji) // count)][:count], self.draw(scenes)])


def load_materials(recipe: DataRecipe) -> Materials:
    """Opens what the recipe names; builds on first use. Raises: StartupError when a package can't be had; ValueError for too few emoji."""
    stamps = load_stamps() if recipe.has_stamps else {}
    emoji = load_emoji(recipe.size, recipe.styles) if recipe.styles else EmojiSet((), {}, {})
    memorised = EmojiSet(
        emoji.entries,
        {style: emoji.pictures[style] for style in recipe.memory_styles},
        {style: emoji.present[style] for style in recipe.memory_styles},
    )
    chosen = memory_subset(memorised, recipe.memory_count) if recipe.memory_count else []
    return Materials(recipe, World(tuple(stamps)), Brush(stamps), emoji, tuple(chosen))


def vocabulary_texts(materials: Materials) -> Iterator[str]:
    """What the text's vocabulary is learned from: sentences of the world, names and tags of emoji, and a share of plain text."""
    found = [*_sentences(materials.world), *_names(materials)]
    yield from found
    texts = materials.texts.train
    wanted = TEXT_SHARE * sum(len(each) for each in found)
    yield from texts[:: max(1, int(sum(len(each) for each in texts) / wanted))]


def _sentences(world: World) -> list[str]:
    random = Random(WATCH_SEED)
    turns = [make(random.choice(TASK_NAMES), world, random, random.choice(LANGS), is_trained).turn for _ in range(NUM_SENTENCES)]
    return [piece for turn in turns for piece in (*turn.prompt, *turn.reply) if isinstance(piece, str)]


def _names(materials: Materials) -> list[str]:
    """As they stand in prompts and replies, in both languages."""
    lines = [line for each in materials.emoji.entries for line in (", ".join(each.tags), "，".join(each.tags_zh))]
    memory = Memory(materials.emoji, materials.chosen, {style: np.empty(0, dtype=np.int64) for style in materials.recipe.memory_styles})
    pairs = [*memory.pairs, *memory.held_out]
    lines += [memory.draw_prompt(*pair, is_chinese=is_chinese) for pair in pairs for is_chinese in (False, True)]
    return lines * NAME_COPIES


@dataclass(frozen=True, eq=False)
class Streams:
    """The materials as documents, with a vocabulary and an image tokenizer."""

    materials: Materials
    scribe: Scribe
    vq: VQTokenizer

    @cached_property
    def memory(self) -> Memory:
        """The emoji to be memorised, as codes of their pictures as they are."""
        materials = self.materials
        chosen = list(materials.chosen)
        codes = {}
        for style in materials.recipe.memory_styles:
            found = encode(self.vq, materials.emoji.pictures[style][chosen])
            codes[style] = np.zeros((len(materials.emoji.entries), *found.shape[1:]), dtype=np.int64)
            codes[style][chosen] = found
        return Memory(materials.emoji, materials.chosen, codes)

    @cached_property
    def train_text(self) -> NDArray[np.int32]:
        """All texts to learn from as one stream of ids."""
        return text_stream(self.scribe, self.materials.texts.train)

    def mix(self, shares: Mapping[str, float], encode: Callable[[Pixels], Codes] | None = None) -> WeightedMix:
        """Throws training documents of the named sources. encode: in the image tokenizer's place, but for what is to be memorised.

        Raises: KeyError for an unknown name.
        """
        makers = self._makers()
        scribe = self.scribe if encode is None else replace(self.scribe, encode=encode)
        return WeightedMix(scribe, {name: makers[name]() for name in shares}, shares)

    def watched(self, names: Iterable[str]) -> dict[str, list[Document]]:
        """Documents by source that training never throws: held-out texts, tasks of the world on combinations never trained, and, since
        memory is of what was seen, trained emoji, read from pictures that were newly disturbed."""
        makers = self._held_out_makers()
        return {name: self._thrown(makers[name]()) for name in names}

    def _thrown(self, source: Source) -> list[Document]:
        random = np.random.default_rng(WATCH_SEED)
        thrown = [source(random) for _ in range(self.materials.recipe.num_watched)]
        documents = [each for each in thrown if isinstance(each, Document)]
        return documents + self.scribe.write([each for each in thrown if isinstance(each, Talk)])

    def _makers(self) -> dict[str, Callable[[], Source]]:
        world = self.materials.world
        return {
            "text": lambda: Text(self.train_text),
            **self._memory_makers(),
            **{f"world_{name}": partial(WorldTask, name, world) for name in TASK_NAMES},
            "world_pictures": lambda: Wordless(WorldTask("draw", world)),
            "world_films": lambda: Wordless(WorldTask("move", world)),
        }

    def _held_out_makers(self) -> dict[str, Callable[[], Source]]:
        world = self.materials.world
        return {
            "text": lambda: Text(text_stream(self.scribe, self.materials.texts.held_out)),
            **self._memory_makers(),
            **{f"world_{name}": partial(HeldOutTask, name, world) for name in TASK_NAMES},
            "world_pictures": lambda: Wordless(HeldOutTask("draw", world)),
            "world_films": lambda: Wordless(HeldOutTask("move", world)),
        }

    def _memory_makers(self) -> dict[str, Callable[[], Source]]:
        return {
            "emoji_draw": lambda: MemoryDraw(self.memory, self.memory.pairs),
            "emoji_read": lambda: MemoryRead(self.memory, self.memory.pairs),
            "emoji_pictures": lambda: Wordless(MemoryDraw(self.memory, self.memory.pairs)),
        }


@dataclass(frozen=True, eq=False)
class HeldOutTask:
    """One kind of task of the world, of combinations that are never trained: a thing, or a pair of things."""

    name: TaskName
    world: World

    def __call__(self, random: np.random.Generator) -> Talk:
        own = Random(int(random.integers(2**62)))
        return talk_of(make_held_out(self.name, self.world, own, own.choice(LANGS), own.choice(KINDS)))


def open_streams(recipe: Recipe, materials: Materials, vocabulary: tokenizers.Tokenizer, vq: VQTokenizer) -> Streams:
    """Streams for a recipe. Raises: ValueError for a model without pictures."""
    pictures = recipe.model_config().pictures
    if pictures is None:
        raise ValueError("a recipe's decoder has pictures")
    return Streams(materials, Scribe(vocabulary, pictures, materials.draw, partial(encode, vq)), vq)
