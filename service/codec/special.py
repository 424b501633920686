"""Special tokens: the texts that stand for control ids, found in a template's own text and broken in everybody else's.

Knows no ids' meaning and no model; linear time throughout. Called by the tokenizer and by prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from service.errors import StartupError

# Characters that Unicode reserves for a program's private use and that never stand for text.
MARKERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
LONGEST_TEXT = 256


@dataclass(frozen=True, slots=True)
class Special:
    """A control token. strips_left / strips_right: whitespace beside it belongs to it and is dropped."""

    id: int
    text: str
    strips_left: bool = False
    strips_right: bool = False


class SpecialTokens:
    """All special tokens of one vocabulary, as something to search for. Leftmost first, and the longest of those that start there.

    A text of one character is left out: broken by a marker or not, it could not be told from itself.
    """

    def __init__(self, tokens: Iterable[Special]) -> None:
        """Raises: StartupError when a text is longer than any token has reason to be."""
        self.by_text = {token.text: token for token in tokens}
        self.ids = frozenset(token.id for token in self.by_text.values())
        texts = [text for text in self.by_text if len(text) > 1]
        self._longest = max(map(len, texts), default=0)
        if self._longest > LONGEST_TEXT:
            raise StartupError(f"a special token of the model has {self._longest} characters; at most {LONGEST_TEXT} are supported")
        body = _trie_pattern(texts) if texts else "(?!)"
        self._whole = re.compile(body)
        self._start = re.compile(f"(?={body})(.)", re.DOTALL)
        self._heads = {text[:end] for text in texts for end in range(1, len(text))}
        self._tails = {text[start:] for text in texts for start in range(1, len(text))}

    def protect(self, text: str, marker: str) -> str:
        """The text with a marker inside every special token it spells, overlapping ones too, and at an end that could be the half of
        one whose other half the template supplies. Removing the markers gives the text back."""
        lengths = range(1, min(len(text), self._longest - 1) + 1)
        before = marker if any(text[:n] in self._tails for n in lengths) else ""
        after = marker if any(text[-n:] in self._heads for n in lengths) else ""
        if self._whole.search(text):
            text = self._start.sub(rf"\1{marker}", text)
        return before + text + after

    def split(self, text: str) -> Iterator[str | Special]:
        """The special tokens that a text spells and the plain pieces between them, in order; empty pieces are left out."""
        start = 0
        last: Special | None = None
        for match in self._whole.finditer(text):
            token = self.by_text[match[0]]
            yield from _plain(text[start : match.start()], last, token)
            yield token
            start, last = match.end(), token
        yield from _plain(text[start:], last, None)


def _plain(text: str, before: Special | None, after: Special | None) -> Iterator[str]:
    if before is not None and before.strips_right:
        text = text.lstrip()
    if after is not None and after.strips_left:
        text = text.rstrip()
    if text:
        yield text


def _trie_pattern(texts: Iterable[str]) -> str:
    """A pattern that reads each character of a candidate once, however many hundred texts there are."""
    root: dict[str, Any] = {}
    for text in texts:
        node = root
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}
    return _node_pattern(root)


def _node_pattern(node: dict[str, Any]) -> str:
    prefix = ""
    while len(node) == 1 and "" not in node:
        ((char, node),) = node.items()
        prefix += re.escape(char)
    branches = [re.escape(char) + _node_pattern(child) for char, child in node.items() if char]
    if not branches:
        return prefix
    return f"{prefix}(?:{'|'.join(branches)})" + ("?" if "" in node else "")
