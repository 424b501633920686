"""Text to ids and ids to bytes, for every vocabulary alike. Plain text never becomes a control id here; only `allow_special` does that.

Reads no file (tokenizer_files builds it) and renders no template. Called by prompt, text and the API.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import tokenizers

from service.codec.special import Special, SpecialTokens


@dataclass(frozen=True, slots=True)
class Ends:
    """The ids at the ends of a text. add_bos: does a raw prompt start with bos_id? eos_ids: each of them ends an answer. closing_id:
    what a text that is read for its vector ends with ([SEP] of an encoder), None for nothing."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    closing_id: int | None = None


class Tokenizer:
    """Both directions of one vocabulary. Immutable, and safe to use from several threads."""

    def __init__(
        self, pieces: Sequence[bytes], special: SpecialTokens, ends: Ends, first: tokenizers.Tokenizer, rest: tokenizers.Tokenizer
    ) -> None:
        """pieces: each id's bytes, empty for special ones. first encodes the plain text at the start of a text, rest what follows a
        special token; neither knows a special token, so neither can produce one."""
        self.special = special
        self.ends = ends
        self._pieces = tuple(pieces)
        self.first = first
        self._rest = rest
        self._text_of = {token.id: token.text.encode() for token in special.by_text.values()}

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a text; what spells a special token is one only with allow_special. Adds no beginning of sequence.

        Raises: ValueError for a text with half a surrogate pair, which has no bytes.
        """
        return self._encode(self.special.split(text) if allow_special else [text], "")

    def encode_prompt(self, text: str, marker: str) -> list[int]:
        """Ids of a rendered template: special tokens where no marker breaks them, then every marker removed.

        Raises: ValueError as `encode`.
        """
        return self._encode(self.special.split(text), marker)

    def _encode(self, parts: Iterable[str | Special], marker: str) -> list[int]:
        ids: list[int] = []
        encoder = self.first
        for part in parts:
            if isinstance(part, Special):
                ids.append(part.id)
            else:
                plain = part.replace(marker, "") if marker else part
                plain.encode()  # the library's own refusal of a lone surrogate is a TypeError about something else
                # The library's `encode` keeps the interpreter's lock for its whole run, seconds for megabytes; its batches let it go.
                ids += encoder.encode_batch_fast([plain], add_special_tokens=False)[0].ids
            encoder = self._rest
        return ids

    @property
    def pieces(self) -> list[bytes]:
        """Each id's bytes; a special token's are its text, and its id is one of special.ids."""
        return [self._text_of.get(token, piece) for token, piece in enumerate(self._pieces)]

    def token_bytes(self, token: int, *, skip_special: bool = True) -> bytes:
        """One id's share of the output; empty for a special token unless it is wanted, and for an id beyond the vocabulary."""
        if not skip_special and token in self._text_of:
            return self._text_of[token]
        return self._pieces[token] if 0 <= token < len(self._pieces) else b""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids, U+FFFD where their bytes are no UTF-8."""
        return b"".join(self.token_bytes(token, skip_special=skip_special) for token in ids).decode("utf-8", "replace")
