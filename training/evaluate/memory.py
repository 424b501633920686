"""How well emoji are drawn and named: those that were trained, and the (emoji, style) pairs that were held out, beside copying.

What was drawn is judged by `NearestPicture`, which knows colours and edges and no codes. Called by the evaluation's run.
Shape suffixes: N prompts, S pixels of a side, R rows and W columns of codes, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.data.emoji import Emoji
from training.evaluate.nearest import NearestPicture
from training.evaluate.shares import evenly, mean_of, share_of
from training.evaluate.subject import GREEDY, Subject
from training.generate import Sampling
from training.picture.sheet import write_sheet
from training.picture.source import augment
from training.stream.document import Codes, Pixels, Talk
from training.stream.sources import Memory

Pair = tuple[int, str]
"""A place in the set's entries, and a style."""
TEMPERATURE, MIN_P = 0.9, 0.1
SHOWN = 12
TAG_TOKENS = 64


@dataclass(frozen=True, eq=False)
class _Judged:
    """The candidate that each drawing is most like, and its codes [N, R, W]."""

    pairs: Sequence[Pair]
    codes: Codes

    def figures(self, wanted: Sequence[Pair], memory: Memory) -> dict[str, Any]:
        """emoji: is it the right one, in whatever style? picture: in the right style too. codes: are all of them those of the picture?"""
        targets = np.stack([memory.codes[style][place] for place, style in wanted])
        equal = (self.codes == targets).reshape(len(wanted), -1)
        return {
            "emoji": share_of(one[0] == other[0] for one, other in zip(self.pairs, wanted, strict=True)),
            "style": share_of(one[1] == other[1] for one, other in zip(self.pairs, wanted, strict=True)),
            "picture": share_of(one == other for one, other in zip(self.pairs, wanted, strict=True)),
            "codes": share_of(equal.all(1)),
            "codes_equal": float(equal.mean()),
        }


class _Judge:
    """Knows every picture of the memory, trained or not."""

    def __init__(self, memory: Memory) -> None:
        self.pairs = sorted([*memory.pairs, *memory.held_out])
        self.nearest = NearestPicture(pictures_of(memory, self.pairs))

    def judge(self, codes: Codes, pixels: Pixels) -> _Judged:
        return _Judged([self.pairs[index] for index in self.nearest.to(pixels)], codes)


def pictures_of(memory: Memory, pairs: Sequence[Pair]) -> Pixels:
    return np.stack([memory.emoji.pictures[style][place] for place, style in pairs])


def memory_figures(subject: Subject, out: Path, *, most: int | None) -> dict[str, Any]:
    """Everything about the memory of emoji; empty for a model without one. most: prompts of a kind, evenly chosen; None for all.

    Mutates: contact sheets in `out`.
    """
    memory = subject.streams.memory
    if not memory.pairs:
        return {}
    trained, held_out = ([pairs[index] for index in evenly(len(pairs), most)] for pairs in (memory.pairs, memory.held_out))
    judge = _Judge(memory)
    figures: dict[str, Any] = {
        "emoji": len(memory.chosen),
        "styles": list(memory.styles),
        "pairs": len(memory.pairs),
        "judge": _checked(subject, judge),
    }
    figures["trained"], _ = _drawn(subject, judge, trained, out / "emoji-trained.png")
    if held_out:
        figures["held_out"], codes = _drawn(subject, judge, held_out, out / "emoji-held-out.png")
        if len(memory.styles) > 1:  # else there is no other style to copy from
            figures["held_out"] |= _copied(subject, judge, held_out, codes)
    figures["named"] = _named(subject, trained, held_out)
    return figures


def _checked(subject: Subject, judge: _Judge) -> dict[str, Any]:
    """What the judge itself scores: on the pictures, and on what the image tokenizer makes of them."""
    memory, pairs = subject.streams.memory, judge.pairs
    codes = np.stack([memory.codes[style][place] for place, style in pairs])
    real = judge.judge(codes, pictures_of(memory, pairs)).figures(pairs, memory)
    redrawn = judge.judge(codes, subject.pixels(codes)).figures(pairs, memory)
    return {"candidates": len(pairs), "real": real, "reconstructed": redrawn}


def _drawn(subject: Subject, judge: _Judge, pairs: Sequence[Pair], sheet: Path) -> tuple[dict[str, Any], Codes]:
    """English prompts, sampled as the model's defaults are, then greedily; Chinese ones sampled. Beside the figures the first run's codes.

    Mutates: the sheet.
    """
    memory = subject.streams.memory
    sampled = Sampling(TEMPERATURE, MIN_P, seed=subject.seed)
    runs = {"sampled": (sampled, False), "greedy": (GREEDY, False), "sampled, Chinese": (sampled, True)}
    found: dict[str, Any] = {}
    rows = [pictures_of(memory, pairs), subject.pixels(np.stack([memory.codes[style][place] for place, style in pairs]))]
    drawn: dict[str, Codes] = {}
    for name, (sampling, is_chinese) in runs.items():
        drawn[name] = subject.drawings(_drawings(memory, pairs, is_chinese=is_chinese), sampling)[:, 0]
        pixels = subject.pixels(drawn[name])
        found[name] = judge.judge(drawn[name], pixels).figures(pairs, memory)
        rows.append(pixels)
    found["nats_per_code"] = subject.nats_per_code(_drawings(memory, pairs))
    step = max(1, len(pairs) // SHOWN)
    write_sheet(sheet, [row[::step][:SHOWN] for row in rows])
    found["prompts_shown"] = [memory.draw_prompt(place, style) for place, style in pairs[::step][:SHOWN]]
    return found, drawn["sampled"]


def _drawings(memory: Memory, pairs: Sequence[Pair], *, is_chinese: bool = False) -> list[Talk]:
    return [memory.drawing(place, style, memory.draw_prompt(place, style, is_chinese=is_chinese)) for place, style in pairs]


def _copied(subject: Subject, judge: _Judge, pairs: Sequence[Pair], drawn: Codes) -> dict[str, Any]:
    """What somebody scores who hands in the emoji's trained picture in another style, and how much of that picture `drawn` has."""
    memory = subject.streams.memory
    others = [(place, next(each for each in memory.styles if each != style and (place, each) not in pairs)) for place, style in pairs]
    copies = np.stack([memory.codes[style][place] for place, style in others])
    baseline = judge.judge(copies, subject.pixels(copies)).figures(pairs, memory)
    judged = judge.judge(drawn, subject.pixels(drawn))
    return {
        "copy_baseline": baseline,
        "copied_codes": float((drawn == copies).mean()),
        "copied_pictures": share_of(one == other for one, other in zip(judged.pairs, others, strict=True)),
    }


def _named(subject: Subject, trained: Sequence[Pair], held_out: Sequence[Pair]) -> dict[str, Any]:
    """Names and tags, of pictures as they were trained, of fresh disturbed copies of them, and of pairs never trained."""
    memory = subject.streams.memory
    random = np.random.default_rng(subject.seed)
    real = pictures_of(memory, trained)
    kinds: dict[str, tuple[Sequence[Pair], Pixels]] = {"trained": (trained, real), "augmented": (trained, augment(real, random))}
    if held_out:
        kinds["held out"] = (held_out, pictures_of(memory, held_out))
    return {
        name: {
            "en": _names(subject, pairs, pictures, is_chinese=False),
            "zh": _names(subject, pairs, pictures, is_chinese=True),
            "tags": _tags(subject, pairs, pictures),
        }
        for name, (pairs, pictures) in kinds.items()
    }


def _names(subject: Subject, pairs: Sequence[Pair], pictures: Pixels, *, is_chinese: bool) -> dict[str, Any]:
    """label: is the emoji's name right? whole: the style's too."""
    memory = subject.streams.memory
    talks = [memory.naming(picture, place, style, is_chinese=is_chinese) for picture, (place, style) in zip(pictures, pairs, strict=True)]
    wanted = [str(talk.reply[0]) for talk in talks]
    found = subject.texts(talks)
    comma = "，" if is_chinese else ","
    labels = [(one.rpartition(comma)[0], other.rpartition(comma)[0]) for one, other in zip(found, wanted, strict=True)]
    return {
        "label": share_of(one == other for one, other in labels),
        "whole": share_of(one == other for one, other in zip(found, wanted, strict=True)),
    }


def _tags(subject: Subject, pairs: Sequence[Pair], pictures: Pixels) -> dict[str, Any]:
    """English tags: is any of them one of the emoji's, and the mean F1 of the set against the five that are trained."""
    memory = subject.streams.memory
    talks = [memory.tagging(picture, place) for picture, (place, _) in zip(pictures, pairs, strict=True)]
    said = [_tag_set(text) for text in subject.texts(talks, Sampling(max_tokens=TAG_TOKENS))]
    entries = [memory.emoji.entries[place] for place, _ in pairs]
    wanted = [_tag_set(str(talk.reply[0])) for talk in talks]
    return {
        "any": share_of(bool(one & _known(entry)) for one, entry in zip(said, entries, strict=True)),
        "f1": mean_of([f1(one, other) for one, other in zip(said, wanted, strict=True)]),
    }


def _tag_set(text: str) -> set[str]:
    return {each.strip() for each in text.split(",") if each.strip()}


def _known(entry: Emoji) -> set[str]:
    return {each.strip() for tag in entry.tags for each in tag.split(",")}


def f1(said: set[str], wanted: set[str]) -> float:
    """Harmonic mean of precision and recall; 1 when both are empty."""
    if not said and not wanted:
        return 1.0
    return 2 * len(said & wanted) / (len(said) + len(wanted))
