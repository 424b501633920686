"""Where documents come from: the memory of emoji, the world with rules, and plain text; and how a mix of them is thrown.

A source throws one talk (or one run of text) from a generator; nothing is kept between calls. Called by the recipes.
Shape suffixes: N pictures, S pixels of a side, R rows and W columns of codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from training.data.emoji import EmojiSet
from training.data.memory import held_out_style
from training.picture.source import augment
from training.stream.document import Codes, Document, Piece, Pixels, Scribe, Talk
from training.world.scene import World, is_trained
from training.world.tasks import Task, TaskName, make

Source = Callable[[np.random.Generator], Talk | Document]

CHINESE_SHARE = 1 / 3
EMPTY_SHARE = 0.05
"""Of drawings asked for with no words at all: what guidance compares with."""
STYLE_ZH = {"noto": "诺托", "twemoji": "推特", "fluentflat": "扁平"}
AUGMENTED_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class Memory:
    """Emoji to be drawn and named, in styles, from `chosen` places of the set. codes int64 [N, R, W] by style: what is to be drawn, never
    augmented. pairs: the (place, style) pairs that are trained; held_out: the others."""

    emoji: EmojiSet
    chosen: tuple[int, ...]
    codes: Mapping[str, Codes]

    @property
    def styles(self) -> tuple[str, ...]:
        return tuple(self.codes)

    @property
    def pairs(self) -> list[tuple[int, str]]:
        return [pair for pair in self._all() if not self._is_held_out(pair)]

    @property
    def held_out(self) -> list[tuple[int, str]]:
        return [pair for pair in self._all() if self._is_held_out(pair)]

    def _all(self) -> list[tuple[int, str]]:
        return [(place, style) for place in self.chosen for style in self.styles]

    def _is_held_out(self, pair: tuple[int, str]) -> bool:
        return held_out_style(self.emoji.entries[pair[0]].key, self.styles) == pair[1]

    def draw_prompt(self, place: int, style: str, *, is_chinese: bool = False) -> str:
        entry = self.emoji.entries[place]
        return f"{entry.label_zh}，{STYLE_ZH[style]}风格" if is_chinese else f"{entry.label}, {style} style"

    def drawing(self, place: int, style: str, prompt: str) -> Talk:
        return Talk("emoji_draw", (prompt,), (self.codes[style][place],))

    def naming(self, picture: Pixels, place: int, style: str, *, is_chinese: bool = False) -> Talk:
        entry = self.emoji.entries[place]
        if is_chinese:
            return Talk("emoji_name", (picture, "这是什么？"), (f"{entry.label_zh}，{STYLE_ZH[style]}风格",))
        return Talk("emoji_name", (picture, "What is this?"), (f"{entry.label}, {style} style",))

    def tagging(self, picture: Pixels, place: int, *, is_chinese: bool = False) -> Talk:
        entry = self.emoji.entries[place]
        if is_chinese:
            return Talk("emoji_tags", (picture, "标签？"), ("，".join(entry.tags_zh[:5]),))
        return Talk("emoji_tags", (picture, "Tags?"), (", ".join(entry.tags[:5]),))


@dataclass(frozen=True, eq=False)
class MemoryDraw:
    """A trained pair to be drawn from its name, now and then with tags, in Chinese, or from nothing."""

    memory: Memory
    pairs: Sequence[tuple[int, str]]

    def __call__(self, random: np.random.Generator) -> Talk:
        place, style = self.pairs[int(random.integers(len(self.pairs)))]
        if random.random() < EMPTY_SHARE:
            return self.memory.drawing(place, style, "")
        is_chinese = random.random() < CHINESE_SHARE
        prompt = self.memory.draw_prompt(place, style, is_chinese=is_chinese)
        return self.memory.drawing(place, style, ("画" if is_chinese else "Draw ") + prompt if random.random() < 0.3 else prompt)


@dataclass(frozen=True, eq=False)
class MemoryRead:
    """A trained pair to be named or tagged, half of the time from a picture that was shifted, mirrored and recoloured."""

    memory: Memory
    pairs: Sequence[tuple[int, str]]

    def __call__(self, random: np.random.Generator) -> Talk:
        place, style = self.pairs[int(random.integers(len(self.pairs)))]
        picture = self.memory.emoji.pictures[style][place]
        if random.random() < AUGMENTED_SHARE:
            picture = augment(picture[None], random)[0]
        is_chinese = random.random() < CHINESE_SHARE
        if random.random() < 0.25:
            return self.memory.tagging(picture, place, is_chinese=is_chinese)
        return self.memory.naming(picture, place, style, is_chinese=is_chinese)


@dataclass(frozen=True, eq=False)
class WorldTask:
    """One kind of task of the world, of combinations that may be trained."""

    name: TaskName
    world: World

    def __call__(self, random: np.random.Generator) -> Talk:
        own = Random(int(random.integers(2**62)))
        task = make(self.name, self.world, own, "zh" if own.random() < CHINESE_SHARE else "en", is_trained)
        if self.name == "draw" and own.random() < EMPTY_SHARE:
            return Talk("world_draw", ("",), task.turn.reply)
        return talk_of(task)


def talk_of(task: Task) -> Talk:
    return Talk(f"world_{task.name}", task.turn.prompt, task.turn.reply)


@dataclass(frozen=True, eq=False)
class Text:
    """Runs of `length` ids out of one long stream of texts, all of them to be predicted. Source of nothing but text."""

    stream: NDArray[np.int32]
    length: int = 191

    def __call__(self, random: np.random.Generator) -> Document:
        start = int(random.integers(len(self.stream) - self.length))
        ids = self.stream[start : start + self.length].astype(np.int64)
        is_target = np.ones(len(ids), dtype=np.bool_)
        is_target[0] = False
        return Document("text", ids, is_target)


@dataclass(frozen=True, eq=False)
class Wordless:
    """Another source's pictures without any words, every id of them to be predicted: what pre-training learns codes from."""

    source: Callable[[np.random.Generator], Talk]

    def __call__(self, random: np.random.Generator) -> Talk:
        talk = self.source(random)
        pieces: tuple[Piece, ...] = tuple(piece for piece in (*talk.prompt, *talk.reply) if not isinstance(piece, str))
        return Talk("pictures", (), pieces)


@dataclass(frozen=True, eq=False)
class WeightedMix:
    """Sources by name with the shares of documents they give. Callable as a `Mix` of the language stage."""

    scribe: Scribe
    sources: Mapping[str, Source]
    shares: Mapping[str, float]

    def __call__(self, random: np.random.Generator, tokens: int) -> Sequence[Document]:
        names = list(self.shares)
        weights = np.array([self.shares[name] for name in names])
        weights = weights / weights.sum()
        documents: list[Document] = []
        held = 0
        while held < tokens:
            chosen = random.choice(len(names), size=8, p=weights)
            thrown = [self.sources[names[index]](random) for index in chosen]
            fresh = [each for each in thrown if isinstance(each, Document)]
            fresh += self.scribe.write([each for each in thrown if isinstance(each, Talk)])
            documents += fresh
            held += sum(len(each.ids) for each in fresh)
        return documents


def text_stream(scribe: Scribe, texts: Sequence[str]) -> NDArray[np.int32]:
    """All texts one after the other, each between the ids of a beginning and an end."""
    bos, eos = scribe.special("<|bos|>"), scribe.special("<|eos|>")
    encoded = scribe.tokenizer.encode_batch(list(texts), add_special_tokens=False)
    parts = [np.array([bos, *each.ids, eos], dtype=np.int32) for each in encoded]
    return np.concatenate(parts)
