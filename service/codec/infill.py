"""Fill in the middle: the special tokens of models that were trained to write what stands between two texts, and their order.

Told from the vocabulary alone; knows no request. Called by the completions route.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.codec.tokenizer import Tokenizer

# Names of the tokens before the prefix, the suffix and the middle, in the families' own spellings.
_TRIPLES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<PRE>", "<SUF>", "<MID>"),
)
# Families whose suffix comes first and whose prefix runs on into the middle without a mark.
_PAIRS = (("[PREFIX]", "[SUFFIX]"),)


@dataclass(frozen=True, slots=True)
class Infill:
    """The ids of the marks. middle None: the suffix comes first, and what follows the prefix is the middle."""

    prefix: int
    suffix: int
    middle: int | None

    def encode(self, tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
        """Ids of a prompt whose continuation is the middle; both texts are plain. Raises: ValueError for half a surrogate pair."""
        before, after = tokenizer.encode(prefix), tokenizer.encode(suffix)
        ends = tokenizer.ends
        start = [ends.bos_id] if ends.add_bos and ends.bos_id is not None else []
        if self.middle is None:
            return [*start, self.suffix, *after, self.prefix, *before]
        return [*start, self.prefix, *before, self.suffix, *after, self.middle]


def infill_of(tokenizer: Tokenizer) -> Infill | None:
    """None where the model has no such tokens."""
    ids = {text: token.id for text, token in tokenizer.special.by_text.items()}
    for prefix, suffix, middle in _TRIPLES:
        if prefix in ids and suffix in ids and middle in ids:
            return Infill(ids[prefix], ids[suffix], ids[middle])
    for prefix, suffix in _PAIRS:
        if prefix in ids and suffix in ids:
            return Infill(ids[prefix], ids[suffix], None)
    return None
