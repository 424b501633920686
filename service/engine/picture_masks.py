"""The bit masks of picture grammars: which ids may come next in each of their states, as the sampler wants them. Made once a model.

No grammar is followed here: its state says which mask. Called by the engine loop.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from service.scheduling.picture_grammar import Allowed
from service.vocabulary import PictureIds


class PictureMasks:
    """rows: int32 [ceil(V / 32)] by what is allowed, bit set = allowed."""

    def __init__(self, pictures: PictureIds, vocab_size: int) -> None:
        self._num_words = (vocab_size + 31) // 32
        is_code = np.zeros(self._num_words * 32, np.bool_)
        is_code[pictures.first_code : pictures.first_code + pictures.num_codes] = True
        is_text = ~is_code
        is_text[vocab_size:] = False
        is_text[[pictures.begin_id, pictures.frame_id, pictures.end_id]] = False
        is_any, is_between = is_text.copy(), np.zeros_like(is_text)
        is_any[pictures.begin_id] = True
        is_between[[pictures.frame_id, pictures.end_id]] = True
        masks: dict[Allowed, NDArray[np.bool_]] = {"codes": is_code, "text": is_text, "any": is_any, "between": is_between}
        self.rows = {name: np.packbits(mask, bitorder="little").view("<i4").astype(np.int32) for name, mask in masks.items()}

    def is_empty(self, allowed: Allowed, banned: Iterable[int]) -> bool:
        """Is nothing left of what is allowed without the banned ids?"""
        left = self.rows[allowed].copy()
        for token in banned:
            left[token // 32] &= ~np.int32(np.uint32(1 << token % 32).view(np.int32))
        return not left.any()

    def everything(self, count: int) -> NDArray[np.int32]:
        """Rows that allow all ids: int32 [count, ceil(V / 32)]."""
        return np.full((count, self._num_words), -1, np.int32)
