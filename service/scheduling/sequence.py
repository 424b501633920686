"""What the scheduler thinks in: the request it is given, the gang and sequences it makes of it, and the outputs it hands back.

Plain values and their own arithmetic; nothing here knows the pool or another request. The engine makes `Request`s and reads `Output`s;
`Sequence` and `Gang` never leave `service/scheduling`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from service.scheduling.block_pool import BlockKey
from service.scheduling.drafts import Drafter
from service.scheduling.grammar import Grammar, GrammarError
from service.scheduling.plan import PENDING, Drawn, PictureResult, PromptReading
from service.scheduling.reader import PromptReader
from service.scheduling.reading import Read
from service.scheduling.sampling import SamplingParams
from service.vocabulary import PictureIds

Finish = Literal["stop", "length", "abort", "error", "deadline"]


@dataclass(frozen=True, slots=True)
class Request:
    """prompts: one, or two for a guided gang (conditional, unconditional). Choice i draws with seed + i. priority: smaller first.

    deadline: absolute, on the clock of every `now`. tenant salts the prefix-cache keys. guidance is read only with two prompts. grammars:
    one per choice, or none at all. draft_len: ids that may be guessed ahead of what is drawn, where its grammar has room for guesses; they
    change no id. read: what choice 0 tells of its (conditional) prompt; with it sampling.max_tokens may be 0: a choice then ends with
    "length" once its prompt is computed.
    """

    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    sampling: SamplingParams
    num_choices: int = 1
    priority: int = 0
    deadline: float | None = None
    tenant: str = ""
    guidance: float = 1.0
    grammars: tuple[Grammar, ...] = ()
    draft_len: int = 0
    read: Read | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one finished choice. prompt_tokens is the request's (of its conditional prompt), the same in every choice: count it once.

    cached_tokens: of the prompt, found in the prefix cache when the choice was first admitted. completion_tokens counts the stop id
    too. Times in seconds: waiting before the first slice, first slice to first id, first id to the end.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class Output:
    """News of one choice. token: None when it only ends. drawn: the token with its logprobs. finish is set once, in its last output,
    and `usage` with it. stop_id: the id that ended it; it is neither `token` nor in the text. error: why, when its grammar ended it.
    reading: with the first output after the prompt, of a choice that reads. picture: of a request for one."""

    request_id: str
    choice: int
    token: int | None = None
    drawn: Drawn | None = None
    finish: Finish | None = None
    stop_id: int | None = None
    usage: Usage | None = None
    error: GrammarError | None = None
    reading: PromptReading | None = None
    picture: PictureResult | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """State now (running and waiting count choices), and totals since the start; prefix numbers and tokens count tokens. drafts: by kind
    of drafter, ids guessed, and those of them that were right."""

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_total: int
    preemptions: int
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
    steps: int
    drafts: dict[str, tuple[int, int]]


class State(Enum):
    """waiting: holds no block (new, preempted, or waiting for a block that another gang computes). running: may hold blocks."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(eq=False, slots=True)
class Sequence:
    """One stream of ids and where its K/V lives. `tables` has a list of block ids per K/V group, all equally long; -1: given back.

    num_computed: tokens whose K/V is in the pool. num_known: those that were found there; one more than are computed, where the last
    token's logits are wanted and its block was found. num_sealed: leading blocks that are full and computed, or were found. num_trimmed:
    per group, leading entries already looked at by the window. keys: of leading full blocks, made when first asked for; so is grid_starts,
    of leading tokens. tokens: the last one may be `PENDING`; is_code_pending: is it the code of a picture?
    """

    sequence_id: int
    tokens: list[int]
    root: bytes
    tables: list[list[int]]
    num_trimmed: list[int]
    num_computed: int = 0
    num_sealed: int = 0
    num_known: int = 0
    keys: list[BlockKey] = field(default_factory=list)
    grid_starts: list[int] = field(default_factory=list)
    frozen_tables: tuple[tuple[int, ...], ...] | None = None
    is_code_pending: bool = False

    @property
    def num_pending(self) -> int:
        """Tokens that are known and not computed; at least 1 while the sequence lives."""
        return len(self.tokens) - self.num_computed

    def find_grid_starts(self, pictures: PictureIds, start: int, end: int) -> tuple[int, ...]:
        """Of its tokens start ... end - 1: where the picture that each is a code of begins, -1 for others; empty when none is a code.

        Mutates: grid_starts. Tokens that were drawn never change, so what was found stays right, also when they are computed again.
        """
        found = self.grid_starts
        if len(found) < end:
            tokens = self.tokens[len(found) : end]
            if tokens[-1] == PENDING and self.is_code_pending:
                tokens[-1] = pictures.first_code  # any code will do
            found += pictures.grid_starts(tokens, len(found), found[-1] if found else -1)
        wanted = found[start:end]
        return tuple(wanted) if max(wanted) >= 0 else ()

    def expect(self, is_code: bool) -> None:
        """Its next id is being drawn: until it is known, `PENDING` stands in its place."""
        self.tokens.append(PENDING)
        self.is_code_pending = is_code

    def learn(self, token: int) -> None:
        """The id that was drawn, in the place of the pending one or behind the last."""
        if self.tokens[-1] == PENDING:
            self.tokens[-1] = token
        else:
            self.tokens.append(token)

    def drop(self, count: int) -> None:
        """Takes back its last tokens, which were guessed and are not computed."""
        if count:
            del self.tokens[-count:]
            del self.grid_starts[len(self.tokens) :]

    def freeze_tables(self) -> tuple[tuple[int, ...], ...]:
        """The tables as tuples, made anew only after a block came or went. Mutates: frozen_tables."""
        if self.frozen_tables is None:
            self.frozen_tables = tuple(map(tuple, self.tables))
        return self.frozen_tables


@dataclass(eq=False, slots=True)
class Gang:
    """One choice of a request: one or two sequences that are admitted, preempted, advanced and ended together.

    rank: (priority, order of arrival); smaller goes first and loses its blocks last. params: the request's, with this choice's seed
    and max_tokens held to what fits. awaits: key of the block that another gang computes for it. grammar: takes each id once, also
    when the gang is preempted and computed again. reader: of choice 0, where the request reads its prompt; for the first sequence, until
    it has told what it read. drafter: guesses its next ids. num_drafts: of its sequences' last tokens, between plan and commit.
    is_ahead: its sequences' last token is `PENDING`. is_held: what comes after the step in flight can't be planned before that is known.
    """

    request: Request
    choice: int
    params: SamplingParams
    sequences: tuple[Sequence, ...]
    rank: tuple[int, int]
    arrived_at: float
    grammar: Grammar | None = None
    reader: PromptReader | None = None
    drafter: Drafter | None = None
    num_drafts: int = 0
    is_ahead: bool = False
    is_held: bool = False
    state: State = State.WAITING
    num_generated: int = 0
    preemptions: int = 0
    cached_tokens: int = 0
    awaits: bytes | None = None
    first_slice_at: float | None = None
    first_token_at: float | None = None

    @property
    def is_fresh(self) -> bool:
        """Has it never been admitted? Asked of a waiting gang."""
        return self.preemptions == 0

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompts[0])

    @property
    def num_pending(self) -> int:
        """Known tokens of all its sequences that are still to be computed."""
        return sum([sequence.num_pending for sequence in self.sequences])

    @property
    def tokens_left(self) -> int:
        """How many tokens its sequences may still gain."""
        return self.params.max_tokens - self.num_generated

    def hit_limit(self, sequence: Sequence) -> int:
        """How many leading tokens of one of its sequences may be found instead of computed: never the last, whose logits are wanted."""
        last = len(sequence.tokens) - 1
        return min(last, self.reader.hit_limit) if self.reader is not None and sequence is self.sequences[0] else last

    def usage(self, now: float) -> Usage:
        first_slice = now if self.first_slice_at is None else self.first_slice_at
        first_token = now if self.first_token_at is None else self.first_token_at
        return Usage(
            prompt_tokens=self.prompt_len,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.num_generated,
            queue_s=first_slice - self.arrived_at,
            prefill_s=first_token - first_slice,
            decode_s=now - first_token,
            preemptions=self.preemptions,
        )
