"""Log-probabilities of drawn tokens in OpenAI's two shapes: a list of entries for chat, four parallel lists for completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.codec.tokenizer import Tokenizer
from service.engine.messages import TokenLogprob

# JSON has no infinity; vLLM's clients know this number.
_LEAST = -9999.0


def _finite(logprob: float) -> float:
    return logprob if logprob >= _LEAST else _LEAST  # also for NaN


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token, skip_special=False)
    return {"token": _text(data), "logprob": _finite(logprob), "bytes": list(data)}


def chat_entries(tokenizer: Tokenizer, tokens: Sequence[tuple[int, TokenLogprob]]) -> list[dict[str, Any]]:
    """One entry per token, each with its alternatives."""
    return [
        {**_entry(tokenizer, token, drawn.logprob), "top_logprobs": [_entry(tokenizer, other, value) for other, value in drawn.top]}
        for token, drawn in tokens
    ]


class CompletionLogprobs:
    """The four lists of one choice; text_offset counts characters from the start of its text. has_top: were alternatives asked for?"""

    def __init__(self, tokenizer: Tokenizer, has_top: bool) -> None:
        self._tokenizer = tokenizer
        self._has_top = has_top
        self._offset = 0

    def lists(self, tokens: Sequence[tuple[int, TokenLogprob]]) -> dict[str, list[Any]]:
        """Of the next tokens. Mutates: the offset."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, drawn in tokens:
            text = _text(self._tokenizer.token_bytes(token, skip_special=False))
            found["tokens"].append(text)
            found["token_logprobs"].append(_finite(drawn.logprob))
            found["text_offset"].append(self._offset)
            found["top_logprobs"].append(self._top(text, drawn))
            self._offset += len(text)
        return found

    def _top(self, text: str, drawn: TokenLogprob) -> dict[str, float]:
        """By text; where two ids spell the same, the likelier one stays."""
        top: dict[str, float] = {}
        for other, value in drawn.top:
            top.setdefault(_text(self._tokenizer.token_bytes(other, skip_special=False)), _finite(value))
        if self._has_top:
            top.setdefault(text, _finite(drawn.logprob))
        return top
