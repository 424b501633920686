"""Guesses of the ids that a choice will draw next, so that one step can draw several: a guess that is drawn was right, and no id changes.

Speculation with keyed noise: the noise of a position is known before its id is, so plain decoding would have drawn exactly the ids that
are accepted here, greedy or sampled. Stdlib only. Carried by `Gang`, asked by `scheduler`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from service.vocabulary import PictureIds


class Drafter(Protocol):
    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` ids that may follow the tokens."""

    def learn(self, position: int, drawn: Sequence[int]) -> None:
        """What was drawn at position and behind it, behind right guesses and wrong ones. Mutates: the drafter."""


class JacobiDrafter:
    """Guesses the codes of a picture: what the last step drew for a place, if it did, though behind codes that were not right yet; else the
    code above, else the one before. Source: Teng et al. 2024, "Accelerating auto-regressive text-to-image generation with training-free
    speculative Jacobi decoding", section 3, with the noise of a place fixed in place of their acceptance by probability."""

    def __init__(self, pictures: PictureIds) -> None:
        self._pictures = pictures
        self._drawn: dict[int, int] = {}

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        start, columns = len(tokens), self._pictures.columns
        known = list(tokens[-columns:])
        first = start - len(known)
        for position in range(start, start + count):
            above = known[position - columns - first] if position - columns >= first else -1
            token = self._drawn.get(position, above)
            known.append(token if self._pictures.is_code(token) else self._before(known))
        return known[start - first :]

    def _before(self, known: Sequence[int]) -> int:
        return known[-1] if known and self._pictures.is_code(known[-1]) else self._pictures.first_code

    def learn(self, position: int, drawn: Sequence[int]) -> None:
        self._drawn = dict(enumerate(drawn, position))
