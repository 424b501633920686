"""A draft model beside a lane: in front of a step of the lane's model it guesses ids for the few sequences that decode.

It has a runner and blocks of its own, and mirrors each sequence that it guesses for: what it has read, and what it guessed last. All
sequences share its steps, one a place; a text that it has not read comes first, in chunks, one a step of the lane. It draws with the
lane's own sampling parameters and noise, so that its ids are those of the lane's model wherever the two think alike. Called by the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from service.engine.draft_pace import MOST_GAP, PROBE_LEN, DraftPace, Odds, Prospect
from service.scheduling import sequence as scheduled
from service.scheduling.block_pool import BlockPool
from service.scheduling.drafts import DraftWish, DraftWishes
from service.scheduling.plan import Drawn, KVGroup, Sample, Slice, StepPlan
from service.scheduling.sampling import SamplingParams
from service.scheduling.tables import BlockTables

MOST_CHUNKS = 4
"""Chunks of unread text beyond which a sequence is not guessed for while others run: each delays a step of theirs."""


class DraftRunner(Protocol):
    def forward(self, plan: StepPlan) -> Any: ...

    def sample(self, handle: Any, masks: Any = None) -> list[Drawn]: ...


@dataclass(eq=False, slots=True)
class _Mirror:
    """sequence: known tokens, of which num_computed are taken for read, and their blocks. guesses: the ids guessed last, to follow those
    tokens; all but the last of them have been read too. params: to draw with, of the lane's request. num_wanted: ids to guess. gap: steps
    between its probes; wait: until the next one."""

    sequence: scheduled.Sequence
    params: SamplingParams
    odds: Odds
    guesses: list[int] = field(default_factory=list)
    num_wanted: int = 0
    is_probe: bool = False
    gap: int = 0
    wait: int = 0
    num_generated: int = 0


class Drafting:
    """max_context: of the draft model. clock: seconds, monotonic."""

    def __init__(
        self,
        runner: DraftRunner,
        tables: BlockTables,
        *,
        max_context: int,
        max_batch_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        self.pace = DraftPace()
        self._runner = runner
        self._tables = tables
        self._max_context = max_context
        self.max_batch_tokens = max_batch_tokens
        self._clock = clock
        self._mirrors: dict[int, _Mirror] = {}
        self._started, self._has_guesses = 0.0, False
        self._num_steps = 0

    def guess(self, wishes: DraftWishes) -> dict[int, list[int]]:
        """Ids by sequence, for some of those that wished. Mutates: what is known of the sequences, and their blocks."""
        for sequence_id in self._mirrors.keys() - wishes.kept:
            self._tables.release(self._mirrors.pop(sequence_id).sequence)
        guessing: list[_Mirror] = []
        if wishes.wanted:
            mirrors = [self._follow(wish, wishes.num_running) for wish in wishes.wanted]
            if not self.pace.is_plain_due():
                guessing = self._read(self._choose(wishes, mirrors), wishes.num_running)
        self._started, self._has_guesses = self._clock(), bool(guessing)
        return {mirror.sequence.sequence_id: list(mirror.guesses) for mirror in guessing}

    def learn(self, plan: StepPlan) -> None:
        """The lane's step that came after `guess` is done. Mutates: the pace, unless the step did more than decode."""
        if plan.num_tokens == len(plan.samples):
            seconds = self._clock() - self._started
            self.pace.learn_step(plan.num_tokens, len(plan.slices), seconds, has_guesses=self._has_guesses)

    def check(self) -> None:
        """Raises: AssertionError naming the first broken promise."""
        self._tables.check(mirror.sequence for mirror in self._mirrors.values())

    @property
    def num_blocks_used(self) -> int:
        return self._tables.pool.num_used

    # -- what is known of a sequence --

    def _follow(self, wish: DraftWish, num_running: int) -> _Mirror:
        """Takes in what was drawn since, and learns from it how good the last guesses were."""
        mirror = self._mirrors.get(wish.sequence_id) or self._begin(wish)
        sequence = mirror.sequence
        new = list(wish.tokens[len(sequence.tokens) :])
        num_right = next((at for at, pair in enumerate(zip(mirror.guesses, new, strict=False)) if pair[0] != pair[1]), -1)
        is_wrong_next = num_right >= 0
        num_right = num_right if is_wrong_next else min(len(mirror.guesses), len(new))
        sequence.tokens += new
        if mirror.guesses:
            for odds in (mirror.odds, self.pace.odds):
                odds.learn(num_right, is_wrong_next)
            self.pace.learn_saved(max(min(num_right, len(new) - 1), 0), num_running)
            # What was guessed behind is right too now, but the last token is left to be read: what follows it is wanted.
            self._tables.advance(sequence, min(num_right, len(mirror.guesses) - 1, len(new) - 1) + 1)
        mirror.guesses = []
        mirror.num_generated = wish.num_generated
        return mirror

    def _begin(self, wish: DraftWish) -> _Mirror:
        num_groups = len(self._tables.groups)
        sequence = scheduled.Sequence(wish.sequence_id, [], wish.root, [[] for _ in range(num_groups)], [0] * num_groups)
        params = replace(wish.params, logprobs=None)
        mirror = self._mirrors[wish.sequence_id] = _Mirror(sequence, params, Odds(self.pace.odds.value))
        sequence.tokens = list(wish.tokens)
        self._tables.adopt(sequence, self._tables.find_prefix(sequence, len(sequence.tokens) - 1))
        return mirror

    # -- how many --

    def _choose(self, wishes: DraftWishes, mirrors: Sequence[_Mirror]) -> list[_Mirror]:
        """Those that shall be guessed for, each with how many ids it wants, within context and blocks. Mutates: the mirrors' tables."""
        chosen = []
        for wish, mirror in zip(wishes.wanted, mirrors, strict=True):
            sequence = mirror.sequence
            length, num_unread = len(sequence.tokens), sequence.num_pending
            most = min(wish.most, self._max_context - length)
            if most < 1 or (wishes.num_running > 1 and num_unread > MOST_CHUNKS * self.max_batch_tokens):
                continue
            case = Prospect(mirror.odds.value, most, wish.tokens_left, num_unread, wishes.num_running, len(mirrors))
            mirror.num_wanted = self._count(mirror, case)
            num_rows = num_unread + mirror.num_wanted - 1  # nothing follows the last guess
            if mirror.num_wanted and self._tables.missing_rows(sequence, num_rows) <= self._tables.num_free_rows:
                self._tables.extend(sequence, num_rows)
                chosen.append(mirror)
        return chosen

    def _count(self, mirror: _Mirror, case: Prospect) -> int:
        """How many ids to guess for one. Mutates: the mirror, by when it is probed next."""
        count = self.pace.choose(case)
        mirror.is_probe = not count
        if count:
            mirror.gap = mirror.wait = 0
        elif mirror.wait:
            mirror.wait -= 1
        elif self.pace.can_probe(case):
            return min(PROBE_LEN, case.most)
        return count

    # -- steps --

    def _read(self, chosen: Sequence[_Mirror], num_running: int) -> list[_Mirror]:
        """One step for what is unread and the first guesses, and one for each further place. Returns those with guesses."""
        budget, counts = self.max_batch_tokens, dict[_Mirror, int]()
        for mirror in sorted(chosen, key=lambda mirror: mirror.sequence.num_pending):  # a long text must not hold up short ones
            counts[mirror] = min(mirror.sequence.num_pending, budget)
            budget -= counts[mirror]
        counts = {mirror: count for mirror, count in counts.items() if count}
        guessing = [mirror for mirror, count in counts.items() if count == mirror.sequence.num_pending]
        if not counts:
            return []
        started = self._clock()
        self._step([_slice(mirror.sequence, mirror.sequence.num_computed, count) for mirror, count in counts.items()], guessing)
        for mirror, count in counts.items():
            self._tables.advance(mirror.sequence, count - (mirror in guessing))  # the last token stays to be read, see `_follow`
        going = guessing
        while going := [mirror for mirror in going if len(mirror.guesses) < mirror.num_wanted]:
            self._step([_behind(mirror.sequence, mirror.guesses) for mirror in going], going)
        for mirror in guessing:
            if mirror.is_probe:
                mirror.wait = mirror.gap = min(2 * mirror.gap + 1, MOST_GAP)
        self.pace.learn_drafting(self._clock() - started, num_running)
        return guessing

    def _step(self, pieces: list[Slice], drawing: Sequence[_Mirror]) -> None:
        """Mutates: the guesses of those that draw, by one each."""
        started = self._clock()
        pieces.sort(key=lambda piece: len(piece.tokens) > 1)  # one token each first, as attention wants it
        indexes = {piece.sequence_id: index for index, piece in enumerate(pieces)}
        samples = tuple(self._sample(mirror, indexes[mirror.sequence.sequence_id]) for mirror in drawing)
        plan = StepPlan(self._num_steps, tuple(pieces), samples)
        self._num_steps += 1
        for mirror, drawn in zip(drawing, self._runner.sample(self._runner.forward(plan)), strict=True):
            mirror.guesses.append(drawn.token)
        self.pace.draft.learn(plan.num_tokens, self._clock() - started)

    @staticmethod
    def _sample(mirror: _Mirror, slice_index: int) -> Sample:
        sequence, params, ahead = mirror.sequence, mirror.params, len(mirror.guesses)
        num_generated = mirror.num_generated + ahead
        return Sample(
            sequence_id=sequence.sequence_id,
            slice_indexes=(slice_index,),
            params=params,
            position=len(sequence.tokens) + ahead,
            num_generated=num_generated,
            prompt_len=len(sequence.tokens) - mirror.num_generated,
            banned=params.stop_ids if num_generated < params.min_tokens else (),
        )


def _slice(sequence: scheduled.Sequence, start: int, count: int) -> Slice:
    return Slice(sequence.sequence_id, start, tuple(sequence.tokens[start : start + count]), sequence.freeze_tables())


def _behind(sequence: scheduled.Sequence, guesses: Sequence[int]) -> Slice:
    """The newest guess alone."""
    return Slice(sequence.sequence_id, len(sequence.tokens) + len(guesses) - 1, (guesses[-1],), sequence.freeze_tables())


def make_tables(num_blocks: int, block_size: int, groups: tuple[KVGroup, ...], *, has_prefix_cache: bool) -> BlockTables:
    """Of a draft model's own pool."""
    return BlockTables(BlockPool(num_blocks, len(groups)), groups, block_size, has_prefix_cache=has_prefix_cache)
