"""How well plain text is predicted that was held out: bits per byte, source by source.

Called by the evaluation's run. A byte is one of UTF-8, so models with other vocabularies can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from training.data.text import load_text
from training.evaluate.shares import evenly
from training.evaluate.subject import Subject
from training.stream.document import Document
from training.tokens import BOS_ID, EOS_ID

WINDOW, STRIDE = 191, 96
"""A text longer than WINDOW ids, the length of training's runs, is read in windows; each predicts the STRIDE ids behind the one before."""


def text_figures(subject: Subject, *, most: int | None) -> dict[str, Any]:
    """Of every text source of the recipe. most: documents of a source, evenly chosen; None for all.

    Raises: StartupError when a package can't be had.
    """
    held_out = {source: load_text((source,)).held_out for source in subject.materials.recipe.texts}
    return {source: bits_per_byte(subject, [texts[index] for index in evenly(len(texts), most)]) for source, texts in held_out.items()}


def bits_per_byte(subject: Subject, texts: Sequence[str]) -> dict[str, Any]:
    """Of texts as documents of their own, from a beginning to an end id; the end counts as said, but not as a byte."""
    windows = [window for text in texts for window in windows_of([BOS_ID, *subject.scribe.text_ids(text), EOS_ID])]
    nats = subject.nats(windows)
    num_bytes = sum(len(text.encode()) for text in texts)
    return {
        "bits_per_byte": float(nats.sum() / math.log(2) / max(num_bytes, 1)),
        "nats_per_token": float(nats.mean()) if len(nats) else 0.0,
        "documents": len(texts),
        "bytes": num_bytes,
        "tokens": len(nats),
    }


def windows_of(ids: Sequence[int]) -> list[Document]:
    """Documents in which every id but the first is a target exactly once."""
    found, done, start = [], 1, 0
    while done < len(ids):
        end = min(start + WINDOW, len(ids))
        is_target = np.zeros(end - start, dtype=np.bool_)
        is_target[done - start :] = True
        found.append(Document("text", np.array(ids[start:end], dtype=np.int64), is_target))
        done = end
        start = max(0, min(end + STRIDE, len(ids)) - WINDOW)
    return found
