"""Turns of text and pictures as one stream of ids, and which of the ids are to be learned.

The stream of a turn is what the chat template writes in serving: `bos user ... assistant ... eos`. No model here but the image tokenizer,
through a function. Called by the language stages, by generation and by evaluation.
Shape suffixes: N pictures, S pixels of a side, R rows and W columns of codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import tokenizers
from numpy.typing import NDArray

from service.vocabulary import PictureIds
from training.world.scene import Scene

Codes = NDArray[np.int64]
Pixels = NDArray[np.uint8]
Piece = str | Scene | NDArray[np.generic]
"""Text; a scene to be drawn; a picture uint8 [S, S, 3]; or codes int64 [R, W]. Pictures that follow each other are frames of a film."""

UNKNOWN = 1 << 40
"""Ids from here on stand for codes that nobody has computed yet (`CodesLater`)."""
BOS, EOS, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"


def is_code(ids: NDArray[np.int64], pictures: PictureIds) -> NDArray[np.bool_]:
    """Which ids are codes, those included that only stand for one."""
    return np.asarray((ids >= pictures.first_code) & (ids < pictures.first_code + pictures.num_codes) | (ids >= UNKNOWN))


@dataclass(frozen=True, slots=True)
class Talk:
    """What is asked and what shall be answered. kind: which figure of the log it counts for."""

    kind: str
    prompt: tuple[Piece, ...]
    reply: tuple[Piece, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Document:
    """ids; is_target[i]: is ids[i] to be predicted from those before it?"""

    kind: str
    ids: NDArray[np.int64]
    is_target: NDArray[np.bool_]


@dataclass
class CodesLater:
    """Takes an image tokenizer's place as `Scribe.encode` where there is none, because a GPU that is busy elsewhere finds codes faster:
    gives numbers from UNKNOWN on, one for every code that is not known yet, and keeps the pictures. shape: rows and columns of a picture's
    codes."""

    shape: tuple[int, int]
    kept: list[Pixels] = field(default_factory=list)

    def __call__(self, pictures: Pixels) -> Codes:
        rows, columns = self.shape
        first = sum(len(each) for each in self.kept) * rows * columns
        self.kept.append(pictures)
        return UNKNOWN + first + np.arange(len(pictures) * rows * columns).reshape(len(pictures), rows, columns)

    def taken(self) -> Pixels | None:
        """All pictures since the last call, uint8 [N, S, S, 3], None without any; number i from UNKNOWN on stands for code i of them, in
        raster order, one picture after the other. Mutates: what is kept."""
        kept, self.kept = self.kept, []
        return np.concatenate(kept) if kept else None


def with_codes(ids: NDArray[np.int64], codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """ids, where those from UNKNOWN on are places in codes, which are ids too."""
    is_unknown = ids >= UNKNOWN
    return np.where(is_unknown, codes[np.where(is_unknown, ids - UNKNOWN, 0)], ids)


@dataclass(frozen=True, eq=False)
class Scribe:
    """Writes talks as documents. draw: scenes to uint8 [N, S, S, 3]; encode: those to codes int64 [N, R, W]."""

    tokenizer: tokenizers.Tokenizer
    pictures: PictureIds
    draw: Callable[[Sequence[Scene]], Pixels]
    encode: Callable[[Pixels], Codes]

    def special(self, name: str) -> int:
        """Raises: KeyError for a name that the tokenizer does not have."""
        found = self.tokenizer.token_to_id(name)
        if found is None:
            raise KeyError(name)
        return int(found)

    def text_ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def write(self, talks: Sequence[Talk]) -> list[Document]:
        """All pictures of all talks go through the image tokenizer in one call."""
        codes = self._codes([piece for talk in talks for piece in (*talk.prompt, *talk.reply) if not isinstance(piece, str)])
        return [self._write_one(talk, codes) for talk in talks]

    def prompt(self, talk: Talk) -> list[int]:
        """The ids before the reply, for generation."""
        codes = self._codes([piece for piece in talk.prompt if not isinstance(piece, str)])
        return [self.special(BOS), self.special(USER), *self._ids(talk.prompt, codes), self.special(ASSISTANT)]

    def _write_one(self, talk: Talk, codes: dict[int, Codes]) -> Document:
        head = [self.special(BOS), self.special(USER), *self._ids(talk.prompt, codes), self.special(ASSISTANT)]
        tail = [*self._ids(talk.reply, codes), self.special(EOS)]
        is_target = np.zeros(len(head) + len(tail), dtype=np.bool_)
        is_target[len(head) :] = True
        return Document(talk.kind, np.array(head + tail, dtype=np.int64), is_target)

    def _codes(self, pieces: Sequence[Piece]) -> dict[int, Codes]:
        """Codes of every picture, by the identity of its piece."""
        scenes = [piece for piece in pieces if isinstance(piece, Scene)]
        pixels = [piece for piece in pieces if isinstance(piece, np.ndarray) and piece.dtype == np.uint8]
        found = {id(piece): piece.astype(np.int64) for piece in pieces if isinstance(piece, np.ndarray) and piece.dtype != np.uint8}
        drawn = [*([self.draw(scenes)] if scenes else []), *([np.stack(pixels).astype(np.uint8)] if pixels else [])]
        if drawn:
            encoded = self.encode(np.concatenate(drawn))
            found |= {id(piece): each for piece, each in zip([*scenes, *pixels], encoded, strict=True)}
        return found

    def _ids(self, pieces: Sequence[Piece], codes: dict[int, Codes]) -> list[int]:
        ids: list[int] = []
        is_open = False
        for piece in pieces:
            if isinstance(piece, str):
                ids += [self.pictures.end_id] if is_open else []
                ids += self.text_ids(piece)
            else:
                ids.append(self.pictures.frame_id if is_open else self.pictures.begin_id)
                own = codes[id(piece)].ravel()
                ids += np.where(own >= UNKNOWN, own, own + self.pictures.first_code).tolist()
            is_open = not isinstance(piece, str)
        return [*ids, self.pictures.end_id] if is_open else ids
