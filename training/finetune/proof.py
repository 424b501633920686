"""Small data sets to prove fine-tuning on, made from what the package has: `python -m training.finetune.proof FOLDER`.

tokens: descriptions of scenes, tagged; the test's scenes hold combinations that are in no training sentence. sequences: introductions
of Wikipedia with the field that its editors filed them under. instructions: the few words that Wikidata says of an article.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import TypeVar

import click

from training.data.text import wikipedia_entries
from training.finetune.files import Labelled, Sentence, write_labelled, write_sentences
from training.world.grammar import request
from training.world.scene import BACKGROUNDS, Scene, World, has_held_out_triple, is_trained

T = TypeVar("T")
SIZES = {"train": 480, "dev": 100, "test": 300}
_STOPS = re.compile(r"([,.:;])")
_SKIPPED = frozenset(("a", "an", "in", "at", "on", "and", ",", ".", ":", ";", "background", "draw", "paint"))
_CUT_WORDS = 32
_UNFILED = "Uncategorized"


def tagged_scene(scene: Scene, random: Random) -> Sentence:
    """A request for the scene in any English wording. A thing is an entity of the kind that its last word names ("big red star" is a STAR),
    so its first words can be tagged only by who reads ahead; places and backgrounds are entities too."""
    words = _STOPS.sub(r" \1 ", request(scene, "en", random)).split()
    return Sentence(tuple(words), tuple(_tags(words)))


def _tags(words: list[str]) -> Iterator[str]:
    for begin, end, kind in _spans([each.lower() for each in words]):
        yield from ["O"] * (end - begin) if kind is None else [f"B-{kind}", *[f"I-{kind}"] * (end - begin - 1)]


def _spans(words: list[str]) -> Iterator[tuple[int, int, str | None]]:
    """The whole sentence in pieces: (first word, the word behind the last, kind)."""
    at = 0
    while at < len(words):
        end, kind = at + 1, None
        if words[at] == "row":
            end, kind = at + 5, "PLACE"  # row 1 , column 2
        elif words[at] in BACKGROUNDS:
            kind = "BACKGROUND"
        elif words[at] not in _SKIPPED:
            while end < len(words) and words[end] not in _SKIPPED and words[end] != "row":
                end += 1
            kind = "DIGIT" if words[end - 2] == "digit" else words[end - 1].upper()
        yield at, end, kind
        at = end


def write_tokens(folder: Path, seed: int) -> None:
    """Training and development sentences name no held-out shape, every test sentence does. Mutates: the folder."""
    world = World()
    for split, count in SIZES.items():
        random = Random(f"{seed}/{split}")
        allowed = has_held_out_triple if split == "test" else is_trained
        write_sentences(folder / f"{split}.conll", [tagged_scene(world.scene(random, allowed), random) for _ in range(count)])


def write_sequences(folder: Path, seed: int) -> None:
    """The first words of an introduction, and its topic. Mutates: the folder."""
    found = [Labelled(_beginning(each["extract"]), each["topic"]) for each in wikipedia_entries() if each["topic"] != _UNFILED]
    for split, some in _splits(found, seed).items():
        write_labelled(folder / f"{split}.jsonl", some)


def write_instructions(folder: Path, seed: int) -> None:
    """The first words of an introduction, and what its subject is in a few. Mutates: the folder."""
    pairs = [
        {"prompt": f"{each['title']}: {_beginning(each['extract'])}\nWhat is it? Answer in a few words.", "completion": each["description"]}
        for each in wikipedia_entries()
        if each["description"]
    ]
    for split, some in _splits(pairs, seed).items():
        lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in some)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def _beginning(text: str) -> str:
    return " ".join(text.split()[:_CUT_WORDS])


def _splits(found: list[T], seed: int) -> dict[str, list[T]]:
    chosen = iter(Random(seed).sample(found, sum(SIZES.values())))
    return {split: [next(chosen) for _ in range(count)] for split, count in SIZES.items()}


WRITERS = {"tokens": write_tokens, "sequences": write_sequences, "instructions": write_instructions}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(folder: Path, seed: int) -> None:
    """Write the three data sets into folders of their own."""
    for name, write in WRITERS.items():
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        write(own, seed)
        click.echo(f"{own}: {', '.join(f'{count} {split}' for split, count in SIZES.items())}")


if __name__ == "__main__":
    main()
