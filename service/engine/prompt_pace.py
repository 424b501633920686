"""What tokens of prompts cost beside the next tokens of others, learned from measured steps: so many as fit into a time may join those.

Decides how long others may be held up, not whose prompt goes first (`scheduling`). Used by the engine loop, one a lane.
"""

from __future__ import annotations

from dataclasses import replace

from service.scheduling.budget import LEAST_CHUNK, PromptLimit, spans
from service.scheduling.plan import StepPlan

_NUM_SPANS = 13  # up to half a million positions; behind that costs are those of the last
_MOST_MIXED = 16  # steps with prompts in a row; what others alone take is then measured again, in a step without
_UNKNOWN_S = 1e-3  # of a token, before anything is known: twice what a small model takes on two cores
_NEWEST_WEIGHT = 0.4  # a 1k prompt has about ten chunks, each dearer than the one before: the last few must count
_ASKED_WEIGHT = 0.8  # of a step that was made without prompts in order to know: the ones before it may be long past
_OTHER_SPANS = 0.5  # of a change goes to costs of other positions: most come of the machine, which has become slower for all
_LARGEST_CHANGE = 8.0  # in one step: a machine that was away for a moment is not that slow
_LEAST_S = 1e-6  # of a token: what noise made free must not take many long steps to become dear again


class PromptPace:
    """most_s: that prompts may add to a step, or as much as the step takes without them where that is more: with less than half of the time
    they would be computed in scraps, each as dear as a step (a prompt of 1k then took five times as long). 0: no bound."""

    def __init__(self, most_s: float = 0.0) -> None:
        self._most_s = most_s
        self._others = _OthersEstimate()
        self._num_others = 0  # sequences, in the last step without prompts
        self._num_mixed = 0  # steps since then
        self._is_asking = False  # was the last limit for a step without prompts?
        self._costs: dict[int, float] = {}  # seconds of a token, by span
        self._limit = self._make_limit()

    def next_limit(self, num_decoding: int) -> PromptLimit | None:
        """For the next step, in which so many sequences of this lane get a token. Without prompts now and then: under a steady load there
        would never be a step that shows what the others alone take, and all that became slower would be laid to prompts.

        Mutates: the count of steps, so that no two in a row are without."""
        if not self._most_s:
            return None
        is_doubled = self._num_mixed >= 2 and num_decoding >= 2 * self._num_others
        if num_decoding and (is_doubled or self._num_mixed >= _MOST_MIXED):
            self._num_mixed, self._is_asking = 0, True
            return PromptLimit(0.0, self._limit.costs, least=0)
        return replace(self._limit, most=max(self._most_s, self._others.of(num_decoding)))

    def learn(self, plan: StepPlan, seconds: float) -> None:
        """A step took so long. What others alone would have taken is no cost of the prompts in it."""
        if not plan.slices:
            return
        prompts = _prompts(plan)
        num_tokens = sum(count for _, count in prompts)
        self._num_mixed += 1
        if not num_tokens:
            self._others.learn(plan.num_tokens, seconds, _ASKED_WEIGHT if self._is_asking else _NEWEST_WEIGHT)
            self._num_others, self._num_mixed, self._is_asking = len(plan.slices), 0, False
        if num_tokens < LEAST_CHUNK:  # more barriers than products: would make a long prompt look dear
            return
        self._others.hold(plan.num_tokens - num_tokens, seconds)
        added_s = max(seconds - self._others.of(plan.num_tokens - num_tokens), _LEAST_S)
        ratio = added_s / sum(self._limit.cost(start, count) for start, count in prompts)
        counts = dict.fromkeys(range(_NUM_SPANS), 0)
        for start, count in prompts:
            for span, tokens in spans(start, count):
                counts[min(span, _NUM_SPANS - 1)] += tokens
        weight = _NEWEST_WEIGHT * num_tokens / (num_tokens + LEAST_CHUNK)
        change = weight * (min(ratio, _LARGEST_CHANGE) - 1)
        for span, tokens in counts.items():
            share = _OTHER_SPANS + (1 - _OTHER_SPANS) * tokens / num_tokens
            if span in self._costs:
                self._costs[span] = max(self._costs[span] * (1 + change * share), _LEAST_S)
            elif tokens:
                self._costs[span] = max(self._limit.costs[span] * ratio, _LEAST_S)
        self._limit = self._make_limit()

    def _make_limit(self) -> PromptLimit:
        known = sorted(self._costs) or [0]
        costs = []
        for span in range(_NUM_SPANS):
            near = max((each for each in known if each <= span), default=known[0])
            costs.append(self._costs.get(near, _UNKNOWN_S) * _shape(span) / _shape(near))
        return PromptLimit(self._most_s, tuple(costs))


def _shape(span: int) -> float:
    """How dear the tokens of a span are beside others, where that was not seen: attention adds as much as all else by position 600."""
    return 1 + 0.16 * 2.0**span


class _OthersEstimate:
    """Seconds of a step without prompts: a running mean per power of two of its tokens. One never seen is taken to be like the nearest
    seen: steps of few tokens differ little, and too low an estimate only makes prompts look dearer."""

    def __init__(self) -> None:
        self._mean_s: dict[int, float] = {}

    def of(self, num_tokens: int) -> float:
        if not self._mean_s:
            return 0.0
        return self._mean_s[min(self._mean_s, key=lambda known: abs(known - num_tokens.bit_length()))]

    def learn(self, num_tokens: int, seconds: float, weight: float) -> None:
        size = num_tokens.bit_length()
        mean_s = self._mean_s.get(size, seconds)
        self._mean_s[size] = mean_s + weight * (seconds - mean_s)

    def hold(self, num_tokens: int, seconds: float) -> None:
        """A step with more than that took so long, and these alone can't take longer."""
        if self._mean_s and self.of(num_tokens) > seconds:
            self._mean_s[num_tokens.bit_length()] = seconds


def _prompts(plan: StepPlan) -> list[tuple[int, int]]:
    """Start and length of the slices that hold more than a sequence's next token and guesses behind it."""
    guessed = {index for sample in plan.samples if sample.back for index in sample.slice_indexes}
    return [(piece.start, len(piece.tokens)) for index, piece in enumerate(plan.slices) if len(piece.tokens) > 1 and index not in guessed]
