"""Log-probabilities in JSON: of drawn tokens in OpenAI's two shapes (entries for chat, four parallel lists for completions), of a prompt's
in vLLM's.

Knows no request and no stream of events. Called by the forms of the text routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.api.choice import Token
from service.codec.tokenizer import Tokenizer
from service.engine.messages import Reading, TokenLogprob

# JSON has no infinity; vLLM's clients know this number.
_LEAST = -9999.0


def _finite(logprob: float) -> float:
    return logprob if logprob >= _LEAST else _LEAST  # also for NaN


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token, skip_special=False)
    return {"token": _text(data), "logprob": _finite(logprob), "bytes": list(data)}


def chat_entries(tokenizer: Tokenizer, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """One entry per token, each with its alternatives."""
    return [
        {**_entry(tokenizer, token, drawn.logprob), "top_logprobs": [_entry(tokenizer, other, value) for other, value in drawn.top]}
        for token, drawn in tokens
        if drawn is not None
    ]


def prompt_entries(tokenizer: Tokenizer, prompt: Sequence[int], reading: Reading | None) -> list[dict[str, dict[str, Any]] | None]:
    """By position: nothing for the first id, then what was read of the next ones, by id; the prompt's own id first."""
    read = reading.logprobs if reading is not None else []
    return [None, *(_candidates(tokenizer, token, found) for token, found in zip(prompt[1:], read, strict=False))]


def _candidates(tokenizer: Tokenizer, token: int, found: TokenLogprob) -> dict[str, dict[str, Any]]:
    ranks = {other: rank for rank, (other, _) in enumerate(found.top, 1)}
    every = {token: found.logprob, **dict(found.top)}
    return {
        str(other): {
            "logprob": _finite(value),
            "rank": ranks.get(other),
            "decoded_token": _text(tokenizer.token_bytes(other, skip_special=False)),
        }
        for other, value in every.items()
    }


class CompletionLogprobs:
    """The four lists of one choice; text_offset counts characters from the start of its text. has_top: were alternatives asked for?
    num_echoed: how many tokens are the prompt's, whose special tokens are text; hidden: characters of them that are not shown."""

    def __init__(self, tokenizer: Tokenizer, has_top: bool, num_echoed: int = 0, hidden: int = 0) -> None:
        self._tokenizer = tokenizer
        self._has_top = has_top
        self._num_echoed = num_echoed
        self._offset = -hidden

    def lists(self, tokens: Sequence[Token]) -> dict[str, list[Any]]:
        """Of the next tokens. Mutates: the offset."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, drawn in tokens:
            text = _text(self._tokenizer.token_bytes(token, skip_special=False))
            found["tokens"].append(text)
            found["token_logprobs"].append(None if drawn is None else _finite(drawn.logprob))
            found["text_offset"].append(max(self._offset, 0))
            found["top_logprobs"].append(None if drawn is None else self._top(text, drawn))
            self._pass(token)
        return found

    def _pass(self, token: int) -> None:
        """A character begins with every byte but UTF-8's continuations; special tokens that were drawn are not shown."""
        data = self._tokenizer.token_bytes(token, skip_special=self._num_echoed <= 0)
        self._offset += sum(byte & 0xC0 != 0x80 for byte in data)
        self._num_echoed -= 1

    def _top(self, text: str, drawn: TokenLogprob) -> dict[str, float]:
        """By text; where two ids spell the same, the likelier one stays."""
        top: dict[str, float] = {}
        for other, value in drawn.top:
            top.setdefault(_text(self._tokenizer.token_bytes(other, skip_special=False)), _finite(value))
        if self._has_top:
            top.setdefault(text, _finite(drawn.logprob))
        return top
