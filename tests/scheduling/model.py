"""A model without weights for the scheduler's tests: its K/V store remembers what every block place holds, and it looks before it trusts.

The id it draws is a function of the whole history, read back through the block tables; so a stale, shared-by-mistake or forgotten
block shows as a wrong output or as a complaint. Used by every file in this folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from service.scheduling.budget import PromptLimit
from service.scheduling.grammar import GrammarError
from service.scheduling.plan import PENDING, Drawn, KVGroup, PromptRead, PromptReading, Sample, Slice, StepPlan, TokenReading
from service.scheduling.sampling import SamplingParams
from service.scheduling.scheduler import Scheduler
from service.scheduling.sequence import Output, Request
from service.vocabulary import PictureIds

VOCAB = 11
START = b"start"


def chain(state: bytes, token: int) -> bytes:
    return hashlib.blake2b(state + token.to_bytes(8, "little"), digest_size=8).digest()


def fold(tokens: Sequence[int]) -> bytes:
    state = START
    for token in tokens:
        state = chain(state, token)
    return state


def grid_starts_of(tokens: Sequence[int], pictures: PictureIds) -> tuple[int, ...]:
    """Where the picture of each code begins, -1 for other ids: a run of codes is cut into whole pictures from its front."""
    starts, run = [], 0
    for position, token in enumerate(tokens):
        is_code = pictures.first_code <= token < pictures.first_code + pictures.num_codes
        starts.append(position - run % (pictures.rows * pictures.columns) if is_code else -1)
        run = run + 1 if is_code else 0
    return tuple(starts)


def draw(states: Sequence[bytes], params: SamplingParams, banned: Sequence[int]) -> int:
    """One id from the states of a gang's sequences; the next allowed one when it is banned."""
    token = int.from_bytes(hashlib.blake2b(b"".join(states) + str(params.seed).encode(), digest_size=4).digest(), "little") % VOCAB
    while token in banned:
        token = (token + 1) % VOCAB
    return token


def told(state: bytes, target: int, num_top: int) -> TokenReading:
    """The logprob of an id after a history, and num_top pairs: numbers that no other history or id has."""
    return -float(int.from_bytes(chain(state, target)[:6], "little")), tuple((i, -float(state[i])) for i in range(num_top))


def pooled(states: Sequence[bytes], pool: str) -> bytes | None:
    """The vector of a prompt from the states after each of its ids. A mean is a hash of all, in order."""
    return {"": None, "last": states[-1], "cls": states[0], "mean": hashlib.blake2b(b"".join(states)).digest()}[pool]


def solo_reading(request: Request) -> PromptReading:
    """What a request must be told about its prompt."""
    assert request.read is not None
    prompt, read = request.prompts[0], request.read
    states = [fold(prompt[: end + 1]) for end in range(len(prompt))]
    targets = range(read.first, len(prompt)) if read.first else ()
    return PromptReading(tuple(told(states[at - 1], prompt[at], read.num_top) for at in targets), pooled(states, read.pool))


@dataclass
class CountingGrammar:
    """Complete after `length` ids, or broken by the first `refused` one; remembers what it was given. runs: what has to follow when so many
    ids were taken. is_blind: nobody can say what the next id brings."""

    length: int
    refused: int | None = None
    taken: list[int] = field(default_factory=list)
    runs: dict[int, tuple[int, ...]] = field(default_factory=dict)
    is_blind: bool = False
    draws_code: bool = False

    def accept(self, token: int) -> bool:
        if token == self.refused:
            raise GrammarError(f"{token} does not fit", status=400)
        self.taken.append(token)
        assert len(self.taken) <= self.length, "it was complete"
        return len(self.taken) == self.length

    def certain(self, place: int) -> int | None:
        """The id that has to be the one at a place."""
        return next((run[place - at] for at, run in self.runs.items() if at <= place < min(at + len(run), self.length)), None)

    def forced(self) -> tuple[int, ...]:
        run = []
        while (token := self.certain(len(self.taken) + len(run))) is not None:
            run.append(token)
        return tuple(run)

    @property
    def num_free(self) -> int:
        ends = [at for at in self.runs if at > len(self.taken)]
        return min([*ends, self.length]) - len(self.taken)

    @property
    def is_open(self) -> bool:
        return not self.is_blind and self.certain(len(self.taken) + 1) is None


def solo(request: Request, choice: int, max_tokens: int) -> tuple[list[int], str, int | None]:
    """What a choice yields when nobody else is there: its tokens, its finish, its stop id."""
    params = SamplingParams(max_tokens=max_tokens, seed=request.sampling.seed + choice)
    states = [fold(prompt) for prompt in request.prompts]
    tokens: list[int] = []
    if not max_tokens:
        return tokens, "length", None
    grammar = request.grammars[choice] if request.grammars else None
    while True:
        banned = request.sampling.stop_ids if len(tokens) < request.sampling.min_tokens else ()
        token = draw(states, params, banned)
        if isinstance(grammar, CountingGrammar) and tokens and (certain := grammar.certain(len(tokens))) is not None:
            token = certain
        if token in request.sampling.stop_ids:
            return tokens, "stop", token
        if isinstance(grammar, CountingGrammar) and token == grammar.refused:
            return tokens, "error", None
        tokens.append(token)
        if isinstance(grammar, CountingGrammar) and len(tokens) == grammar.length:
            return tokens, "stop", None
        if len(tokens) >= max_tokens:
            return tokens, "length", None
        states = [chain(state, token) for state in states]


@dataclass
class FakeRunner:
    """places: (block, offset) -> (group, position, token, state after that token). rows: of the newest step, per slice, the state after
    each of its tokens. sums: of sequences whose vector is under way, all states so far. histories: the ids that led to each state. last:
    the id that was drawn last for each sequence."""

    groups: tuple[KVGroup, ...]
    block_size: int
    max_batch_tokens: int
    max_sequences: int
    pictures: PictureIds | None = None
    places: dict[tuple[int, int], tuple[int, int, int, bytes]] = field(default_factory=dict)
    computed: int = 0
    rows: list[list[bytes]] = field(default_factory=list)
    sums: dict[int, list[bytes]] = field(default_factory=dict)
    guessed: int = 0
    histories: dict[bytes, tuple[int, ...]] = field(default_factory=lambda: {START: ()})
    last: dict[int, int] = field(default_factory=dict)

    def run(self, plan: StepPlan) -> list[Drawn]:
        plan = replace(plan, slices=tuple(map(self._resolve, plan.slices)))
        lengths = [len(piece.tokens) for piece in plan.slices]
        assert all(lengths), "an empty slice"
        assert sum(lengths) == plan.num_tokens <= self.max_batch_tokens
        assert len(lengths) <= self.max_sequences
        assert [length > 1 for length in lengths] == sorted(length > 1 for length in lengths), "one token each must come first"
        assert len({piece.sequence_id for piece in plan.slices}) == len(plan.slices), "a sequence twice in one step"
        written: set[tuple[int, int]] = set()
        before = [[self._look_back(piece, group) for group in range(len(self.groups))] for piece in plan.slices]
        self.rows = [self._write(piece, states, written) for piece, states in zip(plan.slices, before, strict=True)]
        for sequence_id in plan.released:
            self.sums.pop(sequence_id, None)
        self.computed += plan.num_tokens
        self.guessed += sum(1 for sample in plan.samples if sample.back)
        drawn = [self._sample(plan, sample) for sample in plan.samples]
        for sample, one in zip(plan.samples, drawn, strict=True):
            self.last.update((plan.slices[index].sequence_id, one.token) for index in sample.slice_indexes)
        return drawn

    def _resolve(self, piece: Slice) -> Slice:
        assert PENDING not in piece.tokens[:-1]
        return replace(piece, tokens=(*piece.tokens[:-1], self.last[piece.sequence_id])) if piece.tokens[-1] == PENDING else piece

    def read(self, plan: StepPlan) -> list[PromptReading]:
        assert len({read.slice_index for read in plan.reads}) == len(plan.reads), "a slice is read twice"
        return [self._read(read, plan.slices[read.slice_index], self.rows[read.slice_index]) for read in plan.reads]

    def _read(self, read: PromptRead, piece: Slice, rows: list[bytes]) -> PromptReading:
        assert read.sequence_id == piece.sequence_id
        assert read.targets or read.pool, "nothing to read"
        following = (*piece.tokens[read.first_row + 1 :], None)
        assert all(got in (want, None) for got, want in zip(following, read.targets, strict=False)), "a target follows another row"
        logprobs = tuple(told(rows[read.first_row + k], target, read.num_top) for k, target in enumerate(read.targets))
        if not read.pool:
            return PromptReading(logprobs)
        if read.pool == "last":
            assert read.is_last
            return PromptReading(logprobs, rows[-1])
        sums = [] if piece.start == 0 else self.sums[read.sequence_id]
        assert len(sums) == piece.start, "a vector lacks the beginning of its prompt"
        self.sums[read.sequence_id] = [*sums, *rows]
        return PromptReading(logprobs, pooled(self.sums[read.sequence_id], read.pool) if read.is_last else None)

    def _look_back(self, piece: Slice, group: int) -> bytes:
        """Checks every earlier place that the slice's first token sees, and returns the state after the token before it."""
        spec, table = self.groups[group], piece.tables[group]
        # Rows that guesses needed stay when these were wrong.
        assert len(table) >= -(-(piece.start + len(piece.tokens)) // self.block_size)
        previous: tuple[int, bytes] | None = None
        for position in range(piece.start):
            if spec.window is not None and piece.start - position >= spec.window and position >= spec.sink:
                continue
            block = table[position // self.block_size]
            assert block >= 0, f"sequence {piece.sequence_id} sees position {position} of group {group}, which was given back"
            at_group, at, token, state = self.places[block, position % self.block_size]
            assert (at_group, at) == (group, position), "the block holds something else"
            if position == 0:
                assert state == chain(START, token)
            elif previous is not None and previous[0] == position - 1:
                assert state == chain(previous[1], token), "the block holds another history"
            previous = (position, state)
        if previous is None or previous[0] != piece.start - 1:
            assert piece.start == 0
            return START
        return previous[1]

    def _write(self, piece: Slice, states: list[bytes], written: set[tuple[int, int]]) -> list[bytes]:
        assert len(set(states)) == 1, "the groups remember different histories"
        state, rows = states[0], []
        self._check_grid_starts(piece, state)
        for position, token in enumerate(piece.tokens, piece.start):
            state = chain(state, token)
            rows.append(state)
            for group, table in enumerate(piece.tables):
                place = (table[position // self.block_size], position % self.block_size)
                assert place[0] >= 0
                if piece.is_first_known and position == piece.start:
                    assert self.places[place] == (group, position, token, state), "what was found is something else"
                    continue
                assert place not in written, "two tokens of one step in one place"
                written.add(place)
                self.places[place] = (group, position, token, state)
        return rows

    def _check_grid_starts(self, piece: Slice, state: bytes) -> None:
        """Against the slice's whole history, which its state names. Mutates: histories."""
        if self.pictures is None:
            assert piece.grid_starts == (), "nobody asked for them"
            return
        history = self.histories[state]
        assert len(history) == piece.start
        for token in piece.tokens:
            state, history = chain(state, token), (*history, token)
            self.histories[state] = history
        expected = grid_starts_of(history, self.pictures)[piece.start :]
        assert piece.grid_starts == (expected if max(expected) >= 0 else ()), "a code's picture begins somewhere else"

    def _sample(self, plan: StepPlan, sample: Sample) -> Drawn:
        first = plan.slices[sample.slice_indexes[0]]
        assert first.sequence_id == sample.sequence_id
        assert sample.position == first.start + len(first.tokens) - sample.back
        assert sample.num_generated == sample.position - sample.prompt_len
        assert sample.num_generated < sample.params.max_tokens, "an id that nobody may have"
        return Drawn(draw([self.rows[index][-1 - sample.back] for index in sample.slice_indexes], sample.params, sample.banned))


@dataclass
class Bench:
    """A scheduler and the fake runner, stepped together; outputs by (request, choice). limit: of every plan's prompts."""

    scheduler: Scheduler
    runner: FakeRunner
    now: float = 0.0
    limit: PromptLimit | None = None
    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    ends: dict[tuple[str, int], Output] = field(default_factory=dict)
    readings: dict[tuple[str, int], PromptReading] = field(default_factory=dict)
    results: dict[int, tuple[list[Drawn], list[PromptReading]]] = field(default_factory=dict)

    def add(self, request: Request) -> None:
        self.scheduler.add(request, self.now)

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            key = (output.request_id, output.choice)
            assert key not in self.ends, f"{key} went on after its end"
            if output.reading is not None:
                assert key not in self.readings, "a prompt was read twice"
                assert key not in self.tokens, "the reading came late"
                self.readings[key] = output.reading
            if output.token is not None:
                assert output.drawn is not None
                assert output.drawn.token == output.token
                self.tokens.setdefault(key, []).append(output.token)
            if output.finish is not None:
                assert output.usage is not None
                self.ends[key] = output

    def plan(self, *, is_ahead: bool = False) -> StepPlan | None:
        plan, outputs = self.scheduler.plan(self.now, self.limit, is_ahead=is_ahead)
        self.take(outputs)
        self.scheduler.check()
        return plan

    def launch(self, plan: StepPlan) -> None:
        """Has the runner compute a plan, which else happens when it is committed."""
        if plan.step_id not in self.results:
            self.results[plan.step_id] = self.runner.run(plan), self.runner.read(plan)

    def commit(self, plan: StepPlan) -> None:
        self.launch(plan)
        drawn, readings = self.results.pop(plan.step_id)
        self.take(self.scheduler.commit(plan, drawn, self.now, readings))
        self.scheduler.check()

    def step(self) -> StepPlan | None:
        plan = self.plan()
        if plan is not None:
            self.now += 1.0
            self.commit(plan)
        return plan

    def drain(self, limit: int = 5000) -> int:
        """Steps until nothing is left; returns their number."""
        for steps in range(limit):
            if not self.scheduler.has_work:
                return steps
            assert self.step() is not None or not self.scheduler.has_work, "something waits and nothing happens"
        raise AssertionError("it never ends")


def make_bench(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    groups: tuple[KVGroup, ...] = (KVGroup(),),
    max_batch_tokens: int = 32,
    max_sequences: int = 16,
    max_context: int = 128,
    has_prefix_cache: bool = True,
    whole_prompts: bool = False,
    pictures: PictureIds | None = None,
    max_drafting: int = 64,
    has_draft_model: bool = False,
    max_waiting_requests: int = 64,
    max_waiting_tokens: int = 2**20,
) -> Bench:
    scheduler = Scheduler(
        num_blocks=num_blocks,
        block_size=block_size,
        groups=groups,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        max_context=max_context,
        has_prefix_cache=has_prefix_cache,
        whole_prompts=whole_prompts,
        pictures=pictures,
        max_drafting=max_drafting,
        has_draft_model=has_draft_model,
        max_waiting_requests=max_waiting_requests,
        max_waiting_tokens=max_waiting_tokens,
    )
    return Bench(scheduler, FakeRunner(groups, block_size, max_batch_tokens, max_sequences, pictures))


def make_request(request_id: str = "a", prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 4, **rest: object) -> Request:
    """rest: fields of `Request`, or of `SamplingParams`."""
    sampling = {key: rest.pop(key) for key in list(rest) if key in SamplingParams.__dataclass_fields__}
    prompts = rest.pop("prompts", (tuple(prompt),))
    return Request(request_id, prompts, SamplingParams(max_tokens=max_tokens, **sampling), **rest)  # type: ignore[arg-type]
