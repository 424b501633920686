"""Documents as arrays: in groups of like length, padded at the end, with what the model reads, what it shall say, and what counts.

numpy and the vocabulary only. Called by the language stages.
Shape suffixes: U documents, L places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.vocabulary import PictureIds
from training.stream.document import Document

LENGTHS = (64, 112, 144, 192, 256, 352, 512, 768, 1088, 1408)
"""Documents are padded to the least of these that holds them, and at most to the longest of their group."""


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """read, say int64 [U, L]: say is read moved by one. counts bool [U, L]: is say a target? grid_start int64 [U, L] of what is read, None
    when no document has a picture. kinds: of each document."""

    read: NDArray[np.int64]
    say: NDArray[np.int64]
    counts: NDArray[np.bool_]
    grid_start: NDArray[np.int64] | None
    kinds: tuple[str, ...]


def batches(documents: Sequence[Document], pictures: PictureIds, pad_id: int, most_tokens: int | None = None) -> Iterator[Batch]:
    """Groups of like length, shortest first. A document longer than the longest length is cut. most_tokens: of a batch, padding included,
    unless one document has more; None puts a whole group into one."""
    bounds = np.array(LENGTHS)
    group_of = [int(np.searchsorted(bounds, min(len(each.ids) - 1, LENGTHS[-1]))) for each in documents]
    for group in sorted(set(group_of)):
        alike = [each for each, own in zip(documents, group_of, strict=True) if own == group]
        count = len(alike) if most_tokens is None else max(1, most_tokens // LENGTHS[group])
        for at in range(0, len(alike), count):
            yield _batch(alike[at : at + count], pictures, pad_id)


def _batch(documents: Sequence[Document], pictures: PictureIds, pad_id: int) -> Batch:
    length = min(max(len(each.ids) for each in documents) - 1, LENGTHS[-1])
    ids = np.full((len(documents), length + 1), pad_id, dtype=np.int64)
    counts = np.zeros((len(documents), length + 1), dtype=np.bool_)
    for row, each in enumerate(documents):
        size = min(len(each.ids), length + 1)
        ids[row, :size] = each.ids[:size]
        counts[row, :size] = each.is_target[:size]
    return Batch(ids[:, :-1], ids[:, 1:], counts[:, 1:], grid_starts(ids[:, :-1], pictures), tuple(each.kind for each in documents))


def grid_starts(ids_UL: NDArray[np.int64], pictures: PictureIds) -> NDArray[np.int64] | None:
    """`PictureIds.grid_start` of every place of whole documents, all at once; None when there are no codes.

    Every run of codes begins behind an id that is none and is one picture long or cut at its document's end, as `Scribe` writes them.
    """
    is_code = (ids_UL >= pictures.first_code) & (ids_UL < pictures.first_code + pictures.num_codes)
    if not is_code.any():
        return None
    places = np.arange(ids_UL.shape[1])
    last_text = np.maximum.accumulate(np.where(is_code, -1, places), axis=1)
    return np.where(is_code, last_text + 1, -1)
