"""Which emoji a small model memorises: well known, evenly over six categories, and no two alike by name or by sight.

Also which (emoji, style) pairs it never sees. Draws nothing and reads no package. Called by training's stages and by evaluation.
Shape suffixes: N emoji, P values of a picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from training.data.emoji import Emoji, EmojiSet
from training.data.split import is_held_out

CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities")
HELD_OUT_SHARE = 0.1
# Of the two pictures' energy, each taken as ink on white. Below it are pairs that differ in a mouth or an eyebrow, which no small
# tokenizer keeps apart; just above it are pairs that a person tells apart at 32 x 32.
LEAST_DIFFERENCE = 0.2


def memory_subset(emoji: EmojiSet, count: int = 600) -> list[int]:
    """Places in emoji.entries of `count` emoji that every style of the set has, in the order of the entries.

    The longest-known come first within a category; a category that has too few leaves its share to the others.
    Raises: ValueError when there are not so many.
    """
    chosen: list[int] = []
    queues = [_by_fame(emoji, category) for category in CATEGORIES]
    alike = _Alike(emoji, [place for queue in queues for place in queue])
    while len(chosen) < count:
        if not any(queues):
            raise ValueError(f"only {len(chosen)} emoji are distinct enough; {count} were asked for")
        for queue in queues:
            while queue and len(chosen) < count:
                place = queue.pop(0)
                if not alike.is_any(place, chosen):
                    chosen.append(place)
                    break
    return sorted(chosen)


def held_out_style(key: str, styles: Sequence[str], share: float = HELD_OUT_SHARE) -> str | None:
    """The style in which an emoji is never shown in training, None for most: share of all pairs, at most one of an emoji."""
    if not is_held_out(key, share * len(styles), "emoji"):
        return None
    return styles[int.from_bytes(hashlib.sha256(f"emoji style:{key}".encode()).digest()[:8], "big") % len(styles)]


def _by_fame(emoji: EmojiSet, category: str) -> list[int]:
    places = [
        place
        for place, entry in enumerate(emoji.entries)
        if entry.category == category and _is_wanted(entry) and all(present[place] for present in emoji.present.values())
    ]
    return sorted(places, key=lambda place: (emoji.entries[place].version, place))


def _is_wanted(entry: Emoji) -> bool:
    """Clocks and moons are families of near-equal pictures, and the suits of cards repeat the hearts."""
    return entry.subcategory != "time" and "moon" not in entry.label and not entry.label.endswith(" suit")


class _Alike:
    """Which emoji can be taken for one another: by one of their names, or in one of their styles."""

    def __init__(self, emoji: EmojiSet, places: Sequence[int]) -> None:
        self._row = {place: row for row, place in enumerate(places)}
        self._names = {place: _names(emoji.entries[place]) for place in places}
        self._differences = [_differences(pictures[list(places)]) for pictures in emoji.pictures.values()]

    def is_any(self, place: int, others: Sequence[int]) -> bool:
        """Is one of the others like this one?"""
        if any(self._names[place] & self._names[other] for other in others):
            return True
        row, rows = self._row[place], [self._row[other] for other in others]
        return any((differences[row, rows] < LEAST_DIFFERENCE).any() for differences in self._differences)


def _names(entry: Emoji) -> frozenset[str]:
    """What a person may call it: "cat face" is "cat" too."""
    words = entry.label.casefold().split()
    short = " ".join(word for word in words if word != "face") or entry.label
    return frozenset((f"en {short}", f"zh {entry.label_zh.removesuffix('脸').removesuffix('头')}"))


def _differences(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[N, N]: how much of two pictures' ink is not the same, 0 for equal ones, about 1 for ones that share nothing."""
    ink = 255 - pictures.reshape(len(pictures), -1).astype(np.float32)  # [N, P]
    energy = (ink**2).sum(1)
    both = energy[:, None] + energy[None]
    apart: NDArray[np.float32] = np.sqrt(np.maximum(both - 2 * ink @ ink.T, 0) / np.maximum(both, 1))
    return apart
