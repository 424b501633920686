"""What one step may hold: so many tokens and, beside sequences that wait for their next one, prompts that cost so much.

Counts alone. What a token costs is told by whoever asks for a plan (the engine, in measured seconds). Used by `roster`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_FIRST_SPAN = 128
"""Tokens in the first span. Attention makes late tokens dearer: with SmolLM2 in int8 on two cores a token costs 0.4 ms at the beginning of
a prompt and 0.8 behind position 500."""
LEAST_CHUNK = 8
"""Tokens of prompts that a step may hold however dear they are, so that a prompt always moves, and both rows of a guided gang."""


def spans(start: int, count: int) -> Iterator[tuple[int, int]]:
    """Where `count` tokens from position `start` lie, as (span, tokens in it). Span 0 has the first 128 positions, each one behind it as
    many as all before."""
    end = start + count
    while start < end:
        span = (start // _FIRST_SPAN).bit_length()
        stop = min(end, _FIRST_SPAN << span)
        yield span, stop - start
        start = stop


@dataclass(frozen=True, slots=True)
class PromptLimit:
    """most: what the prompts of one step may cost. costs: of one token, by span; those of the last hold for all behind it. In one unit,
    whichever. costs must be above 0. least: tokens that are let in whatever they cost; 0 with a most of 0 for a step without prompts."""

    most: float
    costs: tuple[float, ...]
    least: int = LEAST_CHUNK

    def cost(self, start: int, count: int) -> float:
        """Of `count` tokens from position `start`."""
        return sum(self._cost_in(span) * tokens for span, tokens in spans(start, count))

    def tokens(self, start: int, count: int, left: float) -> int:
        """How many of `count` tokens from position `start` cost no more than `left`."""
        found = 0
        for span, tokens in spans(start, count):
            cost = self._cost_in(span)
            if cost * tokens > left:
                return found + max(0, int(left / cost))
            found += tokens
            left -= cost * tokens
        return found

    def _cost_in(self, span: int) -> float:
        return self.costs[min(span, len(self.costs) - 1)]


class StepBudget:
    """What is left of one step. limit: None where prompts may fill it. may_preempt: may somebody lose blocks for it? is_short: somebody
    would have had to, who may not."""

    def __init__(self, tokens: int, limit: PromptLimit | None, *, may_preempt: bool = True) -> None:
        self.tokens = tokens
        self.may_preempt = may_preempt
        self.is_short = False
        self._limit = limit
        self._left = limit.most if limit is not None else 0.0
        self._least = limit.least if limit is not None else 0

    @property
    def has_room_for_prompts(self) -> bool:
        return self.tokens > 0 and (self._limit is None or self._left > 0 or self._least > 0)

    def room(self, start: int, count: int) -> int:
        """How many of `count` tokens of a prompt, from position `start` of its sequence, fit in."""
        if self._limit is None:
            return min(count, self.tokens)
        return min(count, self.tokens, max(self._least, self._limit.tokens(start, count, self._left)))

    def spend(self, count: int) -> None:
        self.tokens -= count

    def charge(self, start: int, count: int) -> None:
        """`count` of the tokens spent are a prompt's, from position `start` of its sequence."""
        self._least = max(0, self._least - count)
        if self._limit is not None:
            self._left -= self._limit.cost(start, count)

    def give_back(self, count: int) -> None:
        """Of somebody who loses his place. What prompts cost is not given back: that is told by nobody, and happens rarely."""
        self.tokens += count
