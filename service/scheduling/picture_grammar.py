"""Where pictures may stand in an answer, as a grammar: after a begin or frame id exactly rows x columns codes, and elsewhere none.

Plain ints. Made by the engine for every choice of a model with pictures that follows no other grammar; the masks that go with its states
are the engine's (`engine/picture_masks`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from service.scheduling.grammar import GrammarError
from service.vocabulary import PictureIds

Allowed = Literal["text", "any", "codes", "between"]
"""Which ids may come next: words; words or the beginning of a picture; codes; a frame or the end behind a whole picture."""


@dataclass(frozen=True, slots=True)
class PictureRule:
    """What an answer may be. num_frames: exactly so many pictures, the first of which the prompt has begun; 0 is words, and with is_free
    also pictures where the model begins some. kept: of the first picture, ids of the codes that are given and -1 for those to be drawn,
    row by row; those at its front are in the prompt already. Empty where all are to be drawn."""

    num_frames: int = 0
    is_free: bool = False
    kept: tuple[int, ...] = ()

    @property
    def num_known(self) -> int:
        """Codes at the front of the first picture that are in the prompt."""
        return next((place for place, code in enumerate(self.kept) if code < 0), len(self.kept))

    def check(self, pictures: PictureIds) -> None:
        """Raises: ValueError."""
        if self.num_frames < 0 or (self.is_free and self.num_frames):
            raise ValueError("an answer has a number of pictures, or as many as the model likes")
        if self.kept and (len(self.kept) != pictures.num_places or self.num_frames < 1):
            raise ValueError(f"a picture has {pictures.num_places} codes to be kept or drawn, not {len(self.kept)}")
        if any(code >= 0 and not pictures.is_code(code) for code in self.kept):
            raise ValueError("what is kept of a picture must be codes")
        if self.kept and self.num_known == len(self.kept):
            raise ValueError("nothing of the picture is to be drawn")


class PictureGrammar:
    """One choice's place in its rule. max_tokens: that the choice may have; a picture that would not end in time is not begun."""

    def __init__(self, pictures: PictureIds, rule: PictureRule, max_tokens: int) -> None:
        self._pictures = pictures
        self._rule = rule
        self._tokens_left = max_tokens
        self._place = rule.num_known if rule.num_frames else -1  # of the next code in its picture, -1 outside of one
        self._num_pictures = 0  # that are whole
        self._is_between = False

    @property
    def allowed(self) -> Allowed:
        if self._place >= 0:
            return "codes"
        if self._is_between:
            return "between"
        return "any" if self._rule.is_free and self._tokens_left > self._pictures.num_places + 1 else "text"

    def accept(self, token: int) -> bool:
        if not self._fits(token):
            raise GrammarError("the model broke the order of its pictures")
        self._tokens_left -= 1
        if self._place >= 0:
            self._place += 1
            if self._place == self._pictures.num_places:
                self._place, self._is_between = -1, True
                self._num_pictures += 1
                return self._num_pictures == self._rule.num_frames
        elif token in (self._pictures.begin_id, self._pictures.frame_id):
            self._place, self._is_between = 0, False
        elif token == self._pictures.end_id:
            self._is_between = False
        return False

    def _fits(self, token: int) -> bool:
        pictures = self._pictures
        if self._place >= 0:
            return pictures.is_code(token)
        if self._is_between:
            return token in (pictures.frame_id, pictures.end_id)
        return not pictures.is_code(token) and token not in (pictures.frame_id, pictures.end_id)

    def forced(self) -> tuple[int, ...]:
        if self._rule.num_frames and self._is_between:
            return (self._pictures.frame_id,)
        if self._is_between and self._tokens_left < self._pictures.num_places + 2:
            return (self._pictures.end_id,)  # one more frame, and the end behind it, would not fit
        if self._place < 0 or self._num_pictures or not self._rule.kept:
            return ()
        rest = self._rule.kept[self._place :]
        return rest[: next((index for index, code in enumerate(rest) if code < 0), len(rest))]

    @property
    def num_free(self) -> int:
        if self._place < 0:
            return 1
        rest = self._rule.kept[self._place :] if self._rule.kept and not self._num_pictures else ()
        until = next((index for index, code in enumerate(rest) if code >= 0), self._pictures.num_places - self._place)
        return max(until, 1)

    @property
    def is_open(self) -> bool:
        return self.num_free > 1 if self._place >= 0 else not self._is_between

    @property
    def draws_code(self) -> bool:
        return self._place >= 0
