"""Whether a draft model is worth its time, and how far it should guess: from measured seconds of steps and from how often it was right.

Numbers in, numbers out: no clock, no ids. Asked and fed by `drafting`.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

LEAST_GAIN = 1.05
"""Expected speed beside plain decoding below which nothing is guessed: costs are means of noisy times."""
PROBE_LEN = 2
"""Ids of a guess that is made to learn whether guessing would be worth it."""
MOST_GAP = 63
"""Steps of a sequence between two such guesses, after many that led to nothing."""
ALLOWANCE = 0.01
"""Share of the time of plain steps that may be lost to probes and to gains that did not come."""
FIRST_PURSE, MOST_PURSE = 16.0, 32.0
"""Plain steps' worth of time that may be lost before anything is known; and that gains may save up, for a text that is harder to guess."""
HORIZON = 64
"""Further ids of a sequence over which reading its text has to pay."""
PLAIN_EVERY = 64
"""Steps with guesses after which one goes without, so that its time stays known."""
_NEWEST_WEIGHT = 0.1
_LEAST_S = 1e-9  # a clock may stand still
_LARGEST_EXACT = 64  # step sizes up to here are told apart, larger ones by powers of two


class StepTimes:
    """Seconds of steps by their number of tokens: running means, and straight lines between and beyond them."""

    def __init__(self) -> None:
        self._mean_s: dict[int, float] = {}

    def learn(self, num_tokens: int, seconds: float) -> None:
        seconds = max(seconds, _LEAST_S)
        size = num_tokens if num_tokens <= _LARGEST_EXACT else 1 << (num_tokens - 1).bit_length()
        mean_s = self._mean_s.get(size, seconds)
        # One step that met a busy machine says little: it counts as twice the mean at most.
        self._mean_s[size] = mean_s + _NEWEST_WEIGHT * (min(seconds, 2 * mean_s) - mean_s)

    def of(self, num_tokens: int) -> float | None:
        """None when nothing is known."""
        sizes = sorted(self._mean_s)
        if not sizes:
            return None
        at = bisect_left(sizes, num_tokens)
        if at == 0:
            return self._mean_s[sizes[0]]
        if len(sizes) == 1:
            return self._mean_s[sizes[0]] * num_tokens / sizes[0]
        low, high = (sizes[-2], sizes[-1]) if at == len(sizes) else (sizes[at - 1], sizes[at])
        slope = (self._mean_s[high] - self._mean_s[low]) / (high - low)
        if at == len(sizes):
            return self._mean_s[high] + max(slope, 0.0) * (num_tokens - high)
        return self._mean_s[low] + slope * (num_tokens - low)


class Odds:
    """How likely a guess is right whose forerunners were, from the newest ones. first: what is thought before any, worth `weight`."""

    def __init__(self, first: float, weight: float = 4.0, memory: float = 0.95) -> None:
        self._right, self._tried = first * weight, weight
        self._memory = memory

    @property
    def value(self) -> float:
        return self._right / self._tried

    def learn(self, num_right: int, is_wrong_next: bool) -> None:
        """So many were right, and then one was wrong, or nothing is known of a next one."""
        for is_right in [1] * num_right + [0] * is_wrong_next:
            self._right = self._right * self._memory + is_right
            self._tried = self._tried * self._memory + 1


@dataclass(frozen=True, slots=True)
class Prospect:
    """What there is to decide on: for a sequence, how likely a guess is right, how many ids it may get at most and how many in all, and
    tokens that the draft model has to read first; sequences in the step, and those of them that guess."""

    odds: float
    most: int
    tokens_left: int
    num_unread: int
    num_running: int
    num_guessing: int


class DraftPace:
    """One lane's. The purse is what makes that guessing never loses much: whatever guesses cost is taken from it, in plain steps' worth of
    time, what they save goes in, and a share of plain time. While it is empty nothing is guessed, whatever the means promise."""

    def __init__(self) -> None:
        self.target, self.draft = StepTimes(), StepTimes()
        self.odds = Odds(0.5, memory=0.99)
        self.purse = FIRST_PURSE
        self._num_asked = 0

    def choose(self, case: Prospect) -> int:
        """How many ids to guess for the greatest gain; 0 where none is to be expected, or none could be paid for."""
        plain_s, step_s = self.target.of(case.num_running), self.draft.of(case.num_guessing)
        if plain_s is None or step_s is None or self.purse < 0:
            return 0
        read_s = self._read_s(case, step_s)
        horizon = min(case.tokens_left, HORIZON)
        best, best_gain, num_right = 0, LEAST_GAIN, 0.0
        for count in range(1, case.most + 1):
            num_right += case.odds**count
            round_s = count * step_s + self._step_s(case, count)
            num_rounds = max(horizon * case.num_running / (case.num_running + case.num_guessing * num_right), 1.0)
            gain = horizon * plain_s / (num_rounds * round_s + read_s)
            if gain > best_gain:
                best, best_gain = count, gain
        return best

    def can_probe(self, case: Prospect) -> bool:
        """Is there enough in the purse for a short guess from which to learn?"""
        plain_s, step_s = self.target.of(case.num_running), self.draft.of(case.num_guessing)
        if plain_s is None:
            return False
        if step_s is None:
            return self.purse >= 0
        cost_s = self._read_s(case, step_s) + PROBE_LEN * step_s + self._step_s(case, PROBE_LEN) - plain_s
        return cost_s <= self.purse * plain_s

    def is_plain_due(self) -> bool:
        """Should this step go without guesses? Asked once in front of each that could have some. Mutates: a count."""
        self._num_asked = (self._num_asked + 1) % PLAIN_EVERY
        return self._num_asked == 0

    def learn_step(self, num_tokens: int, num_running: int, seconds: float, *, has_guesses: bool) -> None:
        """A step of the lane's model that did nothing but decode. has_guesses: of the draft model. Mutates: times and purse."""
        plain_s = self.target.of(num_running)
        self.target.learn(num_tokens, seconds)
        self._fill(ALLOWANCE)
        if has_guesses and plain_s:
            self._fill(min(plain_s - seconds, 0.0) / plain_s)

    def learn_drafting(self, seconds: float, num_running: int) -> None:
        """What the draft model took in front of a step. Mutates: the purse."""
        if plain_s := self.target.of(num_running):
            self._fill(-seconds / plain_s)

    def learn_saved(self, num_right: int, num_running: int) -> None:
        """Ids that came without a step of their own. Mutates: the purse."""
        self._fill(num_right / num_running)

    def _read_s(self, case: Prospect, step_s: float) -> float:
        return max((self.draft.of(case.num_unread) or 0.0) - step_s, 0.0)

    def _step_s(self, case: Prospect, count: int) -> float:
        return self.target.of(case.num_running + case.num_guessing * count) or 0.0

    def _fill(self, steps: float) -> None:
        self.purse = min(self.purse + steps, MOST_PURSE)
