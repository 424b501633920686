"""Documents as arrays of rows: what the model reads, what it shall say, and what counts. One document a row, or rows filled with several.

numpy and the vocabulary only. Called by the language stages.
Shape suffixes: U rows, L places of a row, N pictures, S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.vocabulary import PictureIds
from training.stream.document import Document, is_code

LENGTHS = (64, 112, 144, 192, 256, 352, 512, 768, 1088, 1408)
"""A document with a row to itself is padded to the least of these that holds it, and at most to the longest of its group."""


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """read, say int64 [U, L]: say is read moved by one. counts bool [U, L]: is say a target? grid_start int64 [U, L] of what is read,
    counted from its document's beginning; None when no document has a picture. document_start int64 [U, L]: where in the row each place's
    document begins; None when every row is one document."""

    read: NDArray[np.int64]
    say: NDArray[np.int64]
    counts: NDArray[np.bool_]
    grid_start: NDArray[np.int64] | None
    document_start: NDArray[np.int64] | None = None


def batches(documents: Sequence[Document], pictures: PictureIds, pad_id: int, most_tokens: int | None = None) -> Iterator[Batch]:
    """A row for each document, in groups of like length, shortest first: little is padding. A document longer than the longest length is
    cut. most_tokens: of a batch, padding included, unless one document has more; None puts a whole group into one."""
    bounds = np.array(LENGTHS)
    group_of = [int(np.searchsorted(bounds, min(len(each.ids) - 1, LENGTHS[-1]))) for each in documents]
    for group in sorted(set(group_of)):
        alike = [each for each, own in zip(documents, group_of, strict=True) if own == group]
        count = len(alike) if most_tokens is None else max(1, most_tokens // LENGTHS[group])
        for at in range(0, len(alike), count):
            some = alike[at : at + count]
            length = min(max(len(each.ids) for each in some) - 1, LENGTHS[-1])
            yield _batch([[each] for each in some], length, pictures, pad_id)


def packed(documents: Sequence[Document], pictures: PictureIds, pad_id: int, length: int) -> Batch:
    """All documents in rows of one length, the longest first, each in the first row that has room for it. A longer one is cut."""
    rows: list[list[Document]] = []
    room: list[int] = []
    for each in sorted(documents, key=lambda each: -len(each.ids)):
        size = min(len(each.ids) - 1, length)
        row = next((row for row, left in enumerate(room) if left >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(each)
        room[row] -= size
    return _batch(rows, length, pictures, pad_id)


def _batch(rows: Sequence[Sequence[Document]], length: int, pictures: PictureIds, pad_id: int) -> Batch:
    read, say = (np.full((len(rows), length), pad_id, dtype=np.int64) for _ in range(2))
    counts = np.zeros((len(rows), length), dtype=np.bool_)
    start = np.zeros((len(rows), length), dtype=np.int64)
    for row, documents in enumerate(rows):
        at = 0
        for each in documents:
            size = min(len(each.ids) - 1, length)
            own = slice(at, at + size)
            read[row, own], say[row, own], counts[row, own] = each.ids[:size], each.ids[1 : size + 1], each.is_target[1 : size + 1]
            start[row, own] = at
            at += size
        start[row, at:] = at  # padding behind several documents is one of its own, which nobody sees
    is_alone = all(len(documents) == 1 for documents in rows)
    if is_alone:
        start[:] = 0
    return Batch(read, say, counts, grid_starts(read, start, pictures), None if is_alone else start)


def grid_starts(ids_UL: NDArray[np.int64], start_UL: NDArray[np.int64], pictures: PictureIds) -> NDArray[np.int64] | None:
    """`PictureIds.grid_start` of every place of whole documents, all at once, from each one's beginning; None when there are no codes.

    Every run of codes begins behind an id that is none and is one picture long or cut at its document's end, as `Scribe` writes them.
    """
    codes = is_code(ids_UL, pictures)
    if not codes.any():
        return None
    places = np.arange(ids_UL.shape[1])
    last_text = np.maximum.accumulate(np.where(codes, -1, places), axis=1)
    return np.where(codes, last_text + 1 - start_UL, -1)
