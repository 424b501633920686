"""Who runs: two lists of gangs in order of rank, and the rules by which a gang comes in, gets tokens of a step, or loses its blocks.

Why nothing starves and nothing thrashes:
- A gang may take blocks only from gangs of worse rank, so the best one always goes on, and every gang is the best one some day. `add`
  in `scheduler` has refused what would not fit alone. A gang that finds no block and nobody below it keeps its own and pauses.
- A gang comes in only when all of its known tokens fit beside what the running ones still need. After its p-th preemption everybody,
  itself included, must also be able to grow by 4^p - 1 rows (or to its end), so the number of preemptions by its equals is at most
  logarithmic in the rows of the longest sequence.
- Only waiting gangs wait for a block that another one computes, and only for running gangs of at least their priority; a gang that
  stops running stops being waited for.

No clock, no outputs: those are `scheduler`'s, its only caller. Long, because coming in, getting tokens and losing blocks are rules about
the same two lists, and the promises above hold only for all of them together.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from itertools import pairwise
from operator import attrgetter

from service.scheduling.block_pool import BlockKey
from service.scheduling.budget import PromptLimit, StepBudget
from service.scheduling.drafts import DraftWish, DraftWishes, ModelDrafter
from service.scheduling.sequence import Gang, Sequence, State
from service.scheduling.tables import BlockTables, Prefix

Choice = dict[Gang, tuple[int, ...]]
"""How many tokens of each of a gang's sequences a step computes. Not empty means at least one token."""

_rank = attrgetter("rank")
_UNBOUNDED_ROWS = 2**31
_UNBOUNDED_TOKENS = 2**31
MAX_DRAFTING = 4
"""Running sequences up to which guesses are made. With braid-nano on two cores guessing 8 codes ahead is 2.1 times as fast for one picture,
1.5 for two at once, 1.2 for four and 0.8 for sixteen (docs/results/pictures.json): a step of many has no arithmetic to give away."""
_LAST = (math.inf, math.inf)


class Roster:
    """tables are shared with the scheduler. max_batch_tokens: of a step. max_sequences: running at once. whole_prompts: a step
    computes all pending tokens of a gang or none. max_drafting: sequences, above which nothing is guessed."""

    def __init__(
        self,
        tables: BlockTables,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        whole_prompts: bool = False,
        max_drafting: int = MAX_DRAFTING,
    ) -> None:
        self.tables = tables
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.whole_prompts = whole_prompts
        self.max_drafting = max_drafting
        self.running: list[Gang] = []
        self.waiting: list[Gang] = []
        self.preemptions = 0
        self.prefix_queries = 0  # in tokens, as are the hits
        self.prefix_hits = 0
        self._num_sequences = 0
        self._producers: dict[bytes, Gang] = {}

    def enqueue(self, gang: Gang) -> None:
        gang.state = State.WAITING
        insort(self.waiting, gang, key=_rank)

    def remove(self, gang: Gang) -> None:
        """Takes it out, whatever it was doing, and its blocks with it; what it computed stays findable. Mutates: gang.state."""
        if gang.state is State.RUNNING:
            self._leave(gang)
        elif gang.state is State.WAITING:
            del self.waiting[bisect_left(self.waiting, gang.rank, key=_rank)]
        gang.state = State.ENDED

    @property
    def num_decoding(self) -> int:
        """Sequences that wait for their next token alone."""
        return sum([len(gang.sequences) for gang in self.running if _is_decode(gang)])

    def choose(self, limit: PromptLimit | None = None, *, is_ahead: bool = False) -> Choice:
        """Shares out one step: gangs with one pending token each, then prompts under way and new ones by rank, while tokens and
        blocks last. Nobody comes in when somebody lost blocks in the same step. limit: of prompts, where they can be cut. is_ahead: another
        step is in flight; held gangs are left out, and where somebody would have to lose blocks nothing is chosen, so that the one to lose
        them is found when all is known.

        Mutates: allocates the rows that the choice needs, preempts for gangs of better rank, admits.
        """
        chosen: Choice = {}
        budget = StepBudget(self.max_batch_tokens, None if self.whole_prompts else limit, may_preempt=not is_ahead)
        preemptions = self.preemptions
        able = [gang for gang in self.running if not gang.is_held] if is_ahead else self.running
        decodes = [gang for gang in able if _is_decode(gang)]
        prefills = [gang for gang in able if not _is_decode(gang)] if len(decodes) < len(able) else []
        for gang in (*decodes, *prefills):
            if self.waiting and not _is_decode(gang) and self.preemptions == preemptions:
                self._admit(chosen, budget, gang.rank)  # more urgent than a prompt that is under way
            if budget.tokens <= 0 or not (budget.has_room_for_prompts or _is_decode(gang)):
                break
            if gang.state is State.RUNNING:
                self._place(gang, chosen, budget)
        if self.waiting and self.preemptions == preemptions and not budget.is_short:
            self._admit(chosen, budget)
        return {} if budget.is_short else chosen

    def draft_wishes(self) -> DraftWishes:
        """What a draft model should guess for the next step: of sequences that decode and of which prompt lookup knows nothing, while few
        run or want to. Mutates: their drafters, which look up here already."""
        mine = [(gang, gang.drafter) for gang in self.running if isinstance(gang.drafter, ModelDrafter) and len(gang.sequences) == 1]
        wanted = []
        for gang, drafter in mine if self._num_sequences + len(self.waiting) <= self.max_drafting else ():
            first = gang.sequences[0]
            most = self._most_drafts(gang, (1,), self.max_batch_tokens - self._num_sequences)
            if _is_decode(gang) and gang.reader is None and most > 0 and drafter.wants(first.tokens, most):
                wanted.append(
                    DraftWish(first.sequence_id, first.tokens, first.root, gang.params, gang.num_generated, gang.tokens_left, most)
                )
        return DraftWishes(tuple(wanted), self._num_sequences, frozenset(gang.sequences[0].sequence_id for gang, _ in mine))

    def add_drafts(self, chosen: Choice, offered: Mapping[int, SequenceOf[int]]) -> None:
        """Guesses behind the last token of gangs that can have some, with what is left of the step and of free rows: they cost nobody a
        place. None while many run. offered: a draft model's, by sequence. Mutates: chosen, and the gangs' tokens and rows."""
        if self._num_sequences > self.max_drafting:
            return
        budget = self.max_batch_tokens - sum(map(sum, chosen.values()))
        for gang, counts in chosen.items():
            if gang.drafter is None or gang.reader is not None or sum(counts) < gang.num_pending:
                continue
            most = self._most_drafts(gang, counts, budget)
            if most < 1:
                continue
            if isinstance(gang.drafter, ModelDrafter):
                gang.drafter.offer(offered.get(gang.sequences[0].sequence_id, ()))
            guesses = gang.drafter.guess(gang.sequences[0].tokens, most)
            if not guesses:
                continue
            for sequence, count in zip(gang.sequences, counts, strict=True):
                sequence.tokens += guesses
                self.tables.extend(sequence, count + len(guesses))
            gang.num_drafts = len(guesses)
            budget -= len(gang.sequences) * len(guesses)
            chosen[gang] = tuple(count + len(guesses) for count in counts)

    def _most_drafts(self, gang: Gang, counts: tuple[int, ...], budget: int) -> int:
        """How many ids may be guessed behind so many tokens of a gang."""
        num_free = gang.grammar.num_free if gang.grammar is not None else _UNBOUNDED_TOKENS
        share = len(gang.sequences)
        rows = self.tables.num_free_rows // share
        room = min(self.tables.room(sequence, rows) - count for sequence, count in zip(gang.sequences, counts, strict=True))
        return min(gang.request.draft_len, num_free - 1, gang.tokens_left - 1, budget // share, room)

    def advance(self, gang: Gang, counts: tuple[int, ...]) -> None:
        """So many tokens of a running gang count as computed. `settle` follows when they are."""
        for sequence, count in zip(gang.sequences, counts, strict=True):
            sequence.num_computed += count

    def settle(self, gang: Gang) -> None:
        """What counts as computed of a running gang is: seals its full blocks, and nobody need wait for those any more."""
        for sequence in gang.sequences:
            sealed = sequence.num_sealed
            self.tables.settle(sequence)
            if sequence.num_sealed > sealed:
                self._withdraw(gang, sequence.keys[sealed : sequence.num_sealed])

    def foresee(self, gang: Gang, counts: tuple[int, ...], is_drawn: bool) -> bool:
        """The chosen tokens of a running gang are being computed, and an id drawn, if is_drawn: can what it does next be planned without
        knowing more? Then they count as computed, and the id as pending; else the gang is held.

        A gang that guesses or reads goes on from what it learns; one whose last id this is has ended; of the others none may turn out to
        have ids that were not drawn."""
        can_guess = gang.num_drafts > 0 or (gang.drafter is not None and self._num_sequences <= self.max_drafting)
        is_known_to_end = is_drawn and gang.tokens_left <= 1
        is_open = not is_drawn or gang.grammar is None or gang.grammar.is_open
        gang.is_held = can_guess or gang.reader is not None or is_known_to_end or not is_open
        if gang.is_held:
            return False
        self.advance(gang, counts)
        if is_drawn:
            gang.is_ahead = True
            for sequence in gang.sequences:
                sequence.expect(gang.grammar is not None and gang.grammar.draws_code)
        return True

    def check(self) -> None:
        """Raises: AssertionError naming the first broken promise."""
        for gangs, state in ((self.running, State.RUNNING), (self.waiting, State.WAITING)):
            if any(gang.state is not state for gang in gangs):
                raise AssertionError(f"a gang among the {state.value} ones is not {state.value}")
            if any(left.rank >= right.rank for left, right in pairwise(gangs)):
                raise AssertionError(f"the {state.value} gangs are out of order")
        if any(table for gang in self.waiting for sequence in gang.sequences for table in sequence.tables):
            raise AssertionError("a waiting gang holds blocks")
        if self._num_sequences != sum(len(gang.sequences) for gang in self.running) or self._num_sequences > self.max_sequences:
            raise AssertionError(f"{self._num_sequences} running sequences were counted wrong, or are too many")
        if any(gang.state is not State.RUNNING for gang in self._producers.values()):
            raise AssertionError("a block is awaited from a gang that does not run")
        self.tables.check(sequence for gang in self.running for sequence in gang.sequences)

    # -- tokens of a step --

    def _place(self, gang: Gang, chosen: Choice, budget: StepBudget) -> None:
        """Gives a running gang what it can use of the budget; takes blocks from worse ranks when it could not move otherwise, or leaves
        that to another step.

        Mutates: chosen, budget.
        """
        is_prompt = not _is_decode(gang)
        while True:
            room = budget.room(gang.sequences[0].num_computed, gang.num_pending) if is_prompt else budget.tokens
            if any(counts := self._fit(gang, room, self.tables.num_free_rows)):
                break
            victim = self.running[-1]
            if victim is gang or not any(self._fit(gang, room, _UNBOUNDED_ROWS)):
                return
            if not budget.may_preempt:
                budget.is_short = True
                return
            budget.give_back(sum(chosen.pop(victim, ())))
            self._preempt(victim)
        for sequence, count in zip(gang.sequences, counts, strict=True):
            self.tables.extend(sequence, count)
            budget.spend(count)
            if is_prompt:
                budget.charge(sequence.num_computed, count)
        chosen[gang] = counts

    def _fit(self, gang: Gang, room: int, rows: int) -> tuple[int, ...]:
        """How many tokens of each sequence fit into the room and the rows. Two sequences reach their last token in the same step,
        because one id is drawn from both: while one can't, the other stops a token short."""
        counts = []
        for sequence in gang.sequences:
            count = min(sequence.num_pending, room, self.tables.room(sequence, rows))
            rows -= self.tables.missing_rows(sequence, count)
            room -= count
            counts.append(count)
        if len(counts) == 1 and not self.whole_prompts:
            return tuple(counts)
        if sum(counts) == gang.num_pending:
            return tuple(counts)
        if self.whole_prompts:
            return (0,) * len(counts)
        return tuple(min(count, sequence.num_pending - 1) for count, sequence in zip(counts, gang.sequences, strict=True))

    def _preempt(self, gang: Gang) -> None:
        """Back to waiting, where its rank puts it in front of all that arrived later; its tokens stay, its blocks are cached."""
        self._leave(gang)
        gang.preemptions += 1
        self.preemptions += 1
        self.enqueue(gang)

    # -- coming in --

    def _admit(self, chosen: Choice, budget: StepBudget, before: tuple[float, float] = _LAST) -> None:
        """Lets in waiting gangs whose rank is before the given one. Mutates: chosen, budget."""
        index = 0
        while budget.has_room_for_prompts and index < len(self.waiting) and self._num_sequences < self.max_sequences:
            gang = self.waiting[index]
            if gang.rank > before:
                break
            if self._is_awaiting(gang):
                index += 1
                continue
            if self._num_sequences + len(gang.sequences) > self.max_sequences:
                break
            prefixes = [self.tables.find_prefix(sequence, gang.hit_limit(sequence)) for sequence in gang.sequences]
            gang.awaits = self._awaited(gang, prefixes)
            if gang.awaits is not None:
                index += 1
            elif self._has_room(gang, prefixes):
                del self.waiting[index]
                self._enter(gang, prefixes)
                self._place(gang, chosen, budget)
            else:
                break  # first come, first served: a smaller one behind it must not starve it

    def _has_room(self, gang: Gang, prefixes: list[Prefix]) -> bool:
        if not self.running:
            return True
        cost = sum(self.tables.cost(sequence, prefix) for sequence, prefix in zip(gang.sequences, prefixes, strict=True))
        if cost > self.tables.pool.num_available:
            return False
        growth = 4**gang.preemptions - 1
        reserve = self._growth(gang, growth) + sum(
            self._growth(other, growth) + sum(map(self.tables.missing_blocks, other.sequences)) for other in self.running
        )
        return cost + reserve <= self.tables.pool.num_available

    def _growth(self, gang: Gang, rows: int) -> int:
        """Blocks that a gang may take beyond its known tokens: so many rows, or as many as its end allows."""
        if not rows:
            return 0
        rows = min(rows, self.tables.num_rows(gang.tokens_left))
        return rows * len(gang.sequences) * len(self.tables.groups)

    def _enter(self, gang: Gang, prefixes: list[Prefix]) -> None:
        for sequence, prefix in zip(gang.sequences, prefixes, strict=True):
            self.tables.adopt(sequence, prefix)
        if gang.is_fresh:
            gang.cached_tokens = gang.sequences[0].num_computed
            self.prefix_queries += sum(len(sequence.tokens) for sequence in gang.sequences)
            self.prefix_hits += sum(sequence.num_computed for sequence in gang.sequences)
        gang.state = State.RUNNING
        insort(self.running, gang, key=_rank)
        self._num_sequences += len(gang.sequences)
        for key in self._unsealed_keys(gang.sequences):
            other = self._producers.setdefault(key.digest, gang)
            if other.rank > gang.rank:
                self._producers[key.digest] = gang

    def _leave(self, gang: Gang) -> None:
        self._withdraw(gang, self._unsealed_keys(gang.sequences))
        for sequence in gang.sequences:
            self.tables.release(sequence)
        gang.is_held = False
        del self.running[bisect_left(self.running, gang.rank, key=_rank)]
        self._num_sequences -= len(gang.sequences)

    # -- waiting for a block that another gang computes --

    def _unsealed_keys(self, sequences: Iterable[Sequence]) -> list[BlockKey]:
        """Of the full blocks of known tokens, those still to be computed."""
        if not self.tables.has_prefix_cache:
            return []
        size = self.tables.block_size
        return [
            key
            for sequence in sequences
            if sequence.num_sealed < len(sequence.tokens) // size
            for key in self.tables.keys(sequence, len(sequence.tokens) // size)[sequence.num_sealed :]
        ]

    def _withdraw(self, gang: Gang, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            if self._producers.get(key.digest) is gang:
                del self._producers[key.digest]

    def _awaited(self, gang: Gang, prefixes: list[Prefix]) -> bytes | None:
        """The key of the first block behind a prefix, when it could be hit and a gang of no worse priority is computing it."""
        for sequence, prefix in zip(gang.sequences, prefixes, strict=True):
            if self._producers and prefix.num_rows < gang.hit_limit(sequence) // self.tables.block_size:
                digest = self.tables.keys(sequence, prefix.num_rows + 1)[-1].digest
                if self._will_come(digest, gang):
                    return digest
        return None

    def _is_awaiting(self, gang: Gang) -> bool:
        """Is it known to wait, without another look into the cache?"""
        return gang.awaits is not None and self._will_come(gang.awaits, gang)

    def _will_come(self, digest: bytes, gang: Gang) -> bool:
        producer = self._producers.get(digest)
        return producer is not None and producer.rank[0] <= gang.rank[0]


def _is_decode(gang: Gang) -> bool:
    return gang.num_pending == len(gang.sequences)  # each has at least one
