"""A contact sheet with words: a line for every task, with its prompt, the picture that was given, what was drawn, and what was wanted.

Called by the world's part of evaluation. (Sheets without words are training.picture.sheet's.)
Shape suffixes: F frames, S pixels of a side.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from training.stream.document import Pixels

PICTURE, GAP, TEXT_WIDTH, LINE = 64, 4, 340, 14
LETTERS = 52
"""Of a line of the prompt, at most."""
PAPER = (240, 240, 240)
"""Not white, which some scenes are."""
RIGHT, WRONG = (30, 130, 60), (190, 40, 40)


@dataclass(frozen=True, eq=False, slots=True)
class Strip:
    """given, drawn, wanted: uint8 [F, S, S, 3], any number of frames."""

    words: str
    given: Pixels
    drawn: Pixels
    wanted: Pixels
    is_right: bool


def write_strips(path: Path, strips: Sequence[Strip]) -> None:
    """One line a strip; drawings are framed green where they are right and red where not. Mutates: the path."""
    given, drawn = max(len(each.given) for each in strips), max(len(each.drawn) for each in strips)
    step = PICTURE + GAP
    width = TEXT_WIDTH + (given + 2 * drawn) * step + 4 * GAP
    sheet = Image.new("RGB", (width, LINE + 2 * GAP + len(strips) * step), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE - 3)
    lefts = {"prompt": GAP, "given": TEXT_WIDTH, "drawn": TEXT_WIDTH + given * step + GAP}
    lefts["wanted"] = lefts["drawn"] + drawn * step + GAP
    for name, left in lefts.items():
        pen.text((left, GAP), name, "black", font)
    for index, strip in enumerate(strips):
        top = LINE + 2 * GAP + index * step
        lines = textwrap.wrap(strip.words, LETTERS)[: PICTURE // LINE]
        pen.multiline_text((GAP, top), "\n".join(lines), "black", font, spacing=2)
        for name in ("given", "drawn", "wanted"):
            _paste(sheet, getattr(strip, name), lefts[name], top)
        edge = (lefts["drawn"] - 2, top - 2, lefts["drawn"] + len(strip.drawn) * step - GAP + 1, top + PICTURE + 1)
        pen.rectangle(edge, outline=RIGHT if strip.is_right else WRONG, width=2)
    sheet.save(path, optimize=True)


def _paste(sheet: Image.Image, frames: Pixels, left: int, top: int) -> None:
    for index, frame in enumerate(frames):
        picture = Image.fromarray(frame).resize((PICTURE, PICTURE), Image.Resampling.NEAREST)
        sheet.paste(picture, (left + index * (PICTURE + GAP), top))
