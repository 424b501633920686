"""Which ids of a braided stream are image codes, and where in its grid each code stands. Plain ints: no torch, no tokenizer, no files.

Text and pictures are one stream of ids: `begin, rows x columns codes, end`; a film is `begin, codes, frame, codes, ..., end`. Read by
the model's config, the scheduler, the codec and training.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PictureIds:
    """Codes are the ids first_code ... first_code + num_codes - 1; a picture has rows x columns of them, in raster order.

    A grid of codes follows begin_id, and every frame_id between the frames of a film; end_id closes the last.
    """

    first_code: int
    num_codes: int
    rows: int
    columns: int
    begin_id: int
    frame_id: int
    end_id: int

    @property
    def num_places(self) -> int:
        """Codes in one picture."""
        return self.rows * self.columns

    def is_code(self, token: int) -> bool:
        return self.first_code <= token < self.first_code + self.num_codes

    def grid_start(self, token: int, position: int, before: int) -> int:
        """Where the picture begins that the id at `position` is a code of, -1 when it is none. before: the same of the position before it.

        Codes run on from `before` until a picture is full; a further code begins the next one.
        """
        if not self.is_code(token):
            return -1
        return before if before >= 0 and position - before < self.num_places else position

    def grid_starts(self, tokens: Iterable[int], start: int = 0, before: int = -1) -> list[int]:
        """`grid_start` of every id of a run that begins at position `start`."""
        found = []
        for position, token in enumerate(tokens, start):
            before = self.grid_start(token, position, before)
            found.append(before)
        return found
