"""Guesses of the ids that a choice will draw next, so that one step can draw several: a guess that is drawn was right, and no id changes.

Speculation with keyed noise: the noise of a position is known before its id is, so plain decoding would have drawn exactly the ids that
are accepted here, greedy or sampled. Stdlib only. Carried by `Gang`, asked by `scheduler`. What a draft model guesses is computed in
front of a plan by the engine, which is told here what is wanted (`DraftWishes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from service.scheduling.sampling import SamplingParams
from service.vocabulary import PictureIds

DRAFT_KINDS = ("lookup", "model", "jacobi")
"""Who may have guessed; the names of the counters."""

LEAST_ALIKE, MOST_ALIKE = 2, 5
"""Ids that must have stood before for what followed them to be guessed; one more where the last guess was wrong."""
FIRST_GUESS = 4
"""Ids of a guess before any was right."""
MOST_PAUSE = 31
"""Steps without a guess after many wrong ones."""


@dataclass(frozen=True, slots=True)
class DraftWish:
    """A sequence whose next ids a draft model may guess, at most `most` of them. tokens: all that are known, to be read only and not to be
    kept. root: of its prefix-cache keys. num_generated and tokens_left: ids drawn for it so far, and that it may still gain."""

    sequence_id: int
    tokens: Sequence[int]
    root: bytes
    params: SamplingParams
    num_generated: int
    tokens_left: int
    most: int


@dataclass(frozen=True, slots=True)
class DraftWishes:
    """num_running: sequences that share the coming step. kept: those that may wish again; what is kept for others can go."""

    wanted: tuple[DraftWish, ...]
    num_running: int
    kept: frozenset[int]


class Drafter(Protocol):
    @property
    def kind(self) -> str:
        """What made the last guess."""

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` ids that may follow the tokens."""

    def learn(self, position: int, drawn: Sequence[int]) -> None:
        """What was drawn at position and behind it, behind right guesses and wrong ones. Mutates: the drafter."""


class LookupDrafter:
    """Guesses what followed the last ids where they stood before: an answer that quotes its prompt, or itself, is quickly written.

    The longest run of up to `MOST_ALIKE` last ids that occurred before decides, its newest place first. Guesses get longer, and a shorter
    run suffices, while they are right; those that keep being wrong are made more and more seldom, so that a text without repetition pays
    next to nothing. Source: Saxena 2023, "Prompt lookup decoding"; Yang et al. 2023 (LLMA), section 3.
    """

    kind: str = "lookup"

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}  # where a run of ids ended last
        self._num_known = 0
        self._pause = self._wait = 0
        self._length = FIRST_GUESS
        self._is_trusted = False
        self._guessed: list[int] = []

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        self._guessed = []
        found = self._find(tokens)
        if self._wait:
            self._wait -= 1
        elif found is not None:
            self._guessed = list(tokens[found : found + min(count, self._length)])
        return self._guessed

    def _find(self, tokens: Sequence[int]) -> int | None:
        """Where the text goes on after the last ids, as they stood before. Mutates: the places, by what is new."""
        length = len(tokens)
        for end in range(max(self._num_known, LEAST_ALIKE), length):  # without the last run itself
            for size in range(LEAST_ALIKE, min(MOST_ALIKE, end) + 1):
                self._places[tuple(tokens[end - size : end])] = end
        self._num_known = max(self._num_known, length)
        for size in range(min(MOST_ALIKE, length), LEAST_ALIKE - self._is_trusted, -1):
            if (found := self._places.get(tuple(tokens[length - size :]))) is not None:
                return found
        return None

    def learn(self, position: int, drawn: Sequence[int]) -> None:
        if not self._guessed:
            return
        pairs = enumerate(zip(self._guessed, drawn, strict=False))
        num_right = next((place for place, (guess, token) in pairs if guess != token), len(self._guessed))
        self._length = 2 * self._length if num_right == len(self._guessed) else max(FIRST_GUESS, num_right)
        self._is_trusted = num_right > 0
        self._pause = 0 if num_right else min(2 * self._pause + 1, MOST_PAUSE)
        self._wait = self._pause


class ModelDrafter:
    """Prompt lookup where it has a guess, for that is free, else what a draft model has guessed in front of this step."""

    def __init__(self) -> None:
        self.kind: str = "lookup"
        self._lookup = LookupDrafter()
        self._length = -1  # of the tokens behind which was looked up
        self._found: list[int] = []
        self._offered: Sequence[int] = ()

    def wants(self, tokens: Sequence[int], count: int) -> bool:
        """Has prompt lookup nothing to say? Mutates: the drafter, which keeps what it found for `guess`."""
        return not self._look_up(tokens, count)

    def offer(self, ids: Sequence[int]) -> None:
        """What a draft model says of the step that is being planned. Mutates: the drafter."""
        self._offered = ids

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        found = self._look_up(tokens, count)
        self.kind = "lookup" if found else "model"
        return found[:count] or list(self._offered[:count])

    def learn(self, position: int, drawn: Sequence[int]) -> None:
        if self.kind == "lookup":
            self._lookup.learn(position, drawn)

    def _look_up(self, tokens: Sequence[int], count: int) -> list[int]:
        """Once a step, for every look counts as one."""
        if self._length != len(tokens):
            self._length, self._found = len(tokens), self._lookup.guess(tokens, count)
        return self._found


class JacobiDrafter:
    """Guesses the codes of a picture: what the last step drew for a place, if it did, though behind codes that were not right yet; else the
    code above, else the one before. Source: Teng et al. 2024, "Accelerating auto-regressive text-to-image generation with training-free
    speculative Jacobi decoding", section 3, with the noise of a place fixed in place of their acceptance by probability."""

    kind: str = "jacobi"

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
