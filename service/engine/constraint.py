"""Grammars at work: compiled in a thread of their own under limits, cached by their text, one matcher a choice, masks for the sampler.

The only place that compiles a grammar. No text of a request but its grammar, no device, no scheduler. Called by the engine loop.
Long, because compilation, cache, matchers and masks share one wall against the library's faults.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray

from service.engine.messages import Generate, Vocabulary
from service.errors import BraidError, EngineError, OverloadedError, RequestError
from service.scheduling.grammar import GrammarError
from service.scheduling.plan import Sample

log = logging.getLogger("braid.grammar")

MAX_GRAMMARS = 512
MAX_CACHE_BYTES = 128 << 20
MAX_COMPILING = 256
MAX_GRAMMAR_BYTES = 4 << 20
# A compiled grammar's size, measured: a base, and so much for each byte of its text.
_BASE_BYTES = 64 << 10
_BYTES_PER_BYTE = 100
# The library steps through text that has one continuation only; letting the model spell it keeps its own way to cut it into tokens.
_PREFIX = '%llguidance {"no_forcing": true}\n'
_LIMITS = LLParserLimits(
    max_items_in_row=8_000,  # 4 for each property that may be left out; a row of so many took 10 ms of a core of the bench machine
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
# The library follows rules and references by recursion, and a stack that overflows ends the process. What `service/codec` lets pass
# (200 references of 48 levels, 1,000 rules) stays far below this; pages that are not touched cost nothing.
COMPILE_STACK_BYTES = 256 * 2**20
_TOO_MUCH = "the grammar is too complex to be followed at this point of the answer"
_UNSPELLABLE = "no token of the model fits the grammar here"
_MAX_ERROR = 400


class _Pieces:
    """A vocabulary as the library's wrapper wants it: special tokens begin with 0xFF, so no text can spell them."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        special = set(vocabulary.special_ids)
        pieces = vocabulary.pieces[:vocab_size] + [b""] * (vocab_size - len(vocabulary.pieces))
        self.tokens = [b"\xff" + piece if index in special else piece for index, piece in enumerate(pieces)]
        self.special_token_ids = sorted(index for index in special if index < len(pieces))
        self.eos_token_id = vocabulary.eos_ids[0]
        self.bos_token_id = None

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError("grammars here never ask how a text is cut into tokens")


def make_tokenizer(vocabulary: Vocabulary, vocab_size: int) -> LLTokenizer:
    """vocab_size: width of the logits. Ids beyond the vocabulary, or without bytes, are never allowed."""
    eos_ids = [token for token in vocabulary.eos_ids if token < vocab_size]
    return LLTokenizer(TokenizerWrapper(_Pieces(vocabulary, vocab_size)), eos_token=eos_ids)


def compile_grammar(tokenizer: LLTokenizer, text: str) -> LLMatcher:
    """Lets other threads run meanwhile. Raises: RequestError for a text that is no grammar, or one that nothing can fit."""
    matcher = LLMatcher(tokenizer, _PREFIX + text, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        # What no text fits shows when the first mask is computed; and the first mask is the dearest, so the cache keeps its work.
        matcher.compute_bitmask()
        if not matcher.is_error() and not (matcher.is_stopped() and not matcher.is_accepting()):
            return matcher
    raise _refusal(text, matcher.get_error())


def _refusal(text: str, reason: str) -> RequestError:
    is_schema = "JSON schema" in reason or ("%json" in text and "Stop: NoExtension" in reason)
    short = _readable(reason)
    if is_schema:
        return RequestError(f"the JSON schema can't be followed: {short}", code="invalid_json_schema")
    return RequestError(f"the grammar can't be followed: {short}", code="invalid_grammar")


def _readable(reason: str) -> str:
    """The library's message without places in a text that the client never saw, and without its state."""
    first = re.split(r"\n\s*\d+ \||<state>|<non-verbose/>|<grammar>", reason)[0]
    first = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", first.strip())
    first = re.sub(r"\s*\n\s*", " ", first)
    if first.startswith(("NoExtension", "panic")) or not first:
        first = "no text fits it"
    return first if len(first) <= _MAX_ERROR else first[:_MAX_ERROR] + " ..."


class Constraint:
    """One choice's place in its grammar; a `Grammar` to the scheduler."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    def accept(self, token: int) -> bool:
        try:
            is_taken = self.matcher.consume_token(token)
        except BaseException:  # the library's own panics are no Exception
            log.exception("a grammar failed")
            raise GrammarError("the grammar could not follow the answer") from None
        if not is_taken:
            raise self.failure()
        return self.matcher.is_stopped()

    def forced(self) -> tuple[int, ...]:
        """None: the model keeps its own way to cut a text into tokens."""
        return ()

    @property
    def num_free(self) -> int:
        return 1

    @property
    def is_open(self) -> bool:
        return True

    @property
    def draws_code(self) -> bool:
        return False

    def failure(self) -> GrammarError:
        """Why the matcher can't go on. A limit is the grammar's fault, and so is a text that can't be spelled; all else is ours."""
        error = self.matcher.get_error()
        if self.matcher.stop_reason() in ("ParserTooComplex", "LexerTooComplex") or "too many" in error.lower() or "; max is " in error:
            return GrammarError(_TOO_MUCH, status=RequestError.status)
        if "NoExtension" in error:
            return GrammarError(_UNSPELLABLE, status=RequestError.status)
        log.error("a grammar failed: %s", error[:_MAX_ERROR])
        return GrammarError("the grammar could not follow the answer")


@dataclass(frozen=True, slots=True)
class Stop:
    """A sample of the plan that must not be drawn. error: None when the text is complete."""

    index: int
    error: GrammarError | None = None


class Masks:
    """The bit masks of a step, in one buffer that is used again: int32 [R, ceil(V / 32)], bit set = allowed."""

    def __init__(self, vocab_size: int, num_threads: int) -> None:
        self._words = (vocab_size + 31) // 32
        self._buffer = np.empty((0, self._words), np.int32)
        self._executor = LLExecutor(num_threads)
        # Bits of the last word that stand for no id.
        self._last = np.int32(-1 if vocab_size % 32 == 0 else (1 << vocab_size % 32) - 1)

    def fill(self, samples: Sequence[Sample], constraints: Sequence[Constraint | None]) -> tuple[NDArray[np.int32] | None, list[Stop]]:
        """A row per sample, all ones without a constraint; None when there is none at all. Rows of stops are all ones too.

        The rows are good until the next call.
        """
        held = [(index, constraint) for index, constraint in enumerate(constraints) if constraint is not None]
        if not held:
            return None, []
        if len(samples) > len(self._buffer):
            self._buffer = np.empty((2 * len(samples), self._words), np.int32)
        masks = self._buffer[: len(samples)]
        masks[[index for index, constraint in enumerate(constraints) if constraint is None]] = -1
        self._compute(masks, [(constraint.matcher, index) for index, constraint in held])
        rows = [index for index, _ in held]
        masks[rows, -1] &= self._last
        stops = []
        for (index, constraint), is_open in zip(held, np.any(masks[rows], axis=1).tolist(), strict=True):
            if stop := self._stop(index, constraint, masks[index], samples[index], is_open):
                stops.append(stop)
                masks[index] = -1
        return masks, stops

    def _compute(self, masks: NDArray[np.int32], work: list[tuple[LLMatcher, int]]) -> None:
        """A matcher that fails leaves its row undefined and tells when it is asked."""
        try:
            fill_next_token_bitmask_par(self._executor, work, masks)
        except BaseException:
            # One of them spoils the batch: each by itself, so that only the guilty one ends.
            log.exception("masks could not be computed together")
            for matcher, index in work:
                try:
                    masks[index] = np.frombuffer(matcher.compute_bitmask().ljust(4 * self._words, b"\0"), np.int32)[: self._words]
                except BaseException:
                    log.exception("a mask could not be computed")
                    masks[index] = 0

    def _stop(self, index: int, constraint: Constraint, row: NDArray[np.int32], sample: Sample, is_open: bool) -> Stop | None:
        matcher = constraint.matcher
        if matcher.is_error():
            return Stop(index, constraint.failure())
        if is_open and sample.banned:
            left = row.copy()
            for token in sample.banned:
                left[token // 32] &= ~np.int32(np.uint32(1 << token % 32).view(np.int32))
            is_open = bool(left.any())
        if is_open and not (matcher.is_stopped() and not matcher.is_accepting()):
            return None
        return Stop(index) if matcher.is_accepting() else Stop(index, GrammarError(_UNSPELLABLE, status=RequestError.status))


@dataclass(eq=False, slots=True)
class Waiting:
    """A request whose grammar is being compiled. arrived: on the engine's clock. ended: choices that were aborted meanwhile."""

    request: Generate
    arrived: float
    ended: set[int] = field(default_factory=set)

    @property
    def deadline(self) -> float | None:
        return self.arrived + self.request.timeout_s if self.request.timeout_s else None


@dataclass(eq=False, slots=True)
class _Job:
    text: str
    future: Future[None]
    waiting: dict[str, Waiting] = field(default_factory=dict)


class Constraints:
    """One model's grammars. All methods are for the engine's thread; on_ready is called from the compiling one."""

    def __init__(
        self,
        vocab_size: int,
        on_ready: Callable[[], None],
        *,
        num_threads: int = 2,
        max_grammars: int = MAX_GRAMMARS,
        max_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        self._vocab_size = vocab_size
        self._on_ready = on_ready
        self._max_grammars = max_grammars
        self._max_bytes = max_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._tokenizer: LLTokenizer | None = None  # of the compiling thread
        self._is_taught = False
        self._cache: OrderedDict[bytes, tuple[LLMatcher, int]] = OrderedDict()
        self._cache_bytes = 0
        self._jobs: dict[bytes, _Job] = {}
        self._by_request: dict[str, bytes] = {}
        self._done: deque[tuple[bytes, LLMatcher | BraidError]] = deque()
        self.masks = Masks(vocab_size, num_threads)

    @property
    def num_waiting(self) -> int:
        return len(self._by_request)

    @property
    def has_done(self) -> bool:
        return bool(self._done)

    @property
    def cached(self) -> tuple[int, int]:
        """How many grammars are kept, and how many bytes they count for."""
        return len(self._cache), self._cache_bytes

    def teach(self, vocabulary: Vocabulary) -> None:
        """Raises: nothing; a vocabulary that the library does not take makes every grammar an error."""
        self._is_taught = True
        usual = threading.stack_size(COMPILE_STACK_BYTES)
        try:
            self._thread.submit(self._learn, vocabulary)  # the first piece of work starts the thread
        finally:
            threading.stack_size(usual)

    def take(self, request: Generate, now: float) -> list[Constraint] | None:
        """A constraint per choice when the grammar is at hand; None when the request waits now, to come out of `settle`.

        Raises: RequestError, OverloadedError, EngineError.
        """
        if not self._is_taught:
            raise EngineError("a grammar came before the model's vocabulary")
        if len(request.grammar) > MAX_GRAMMAR_BYTES:
            raise RequestError(f"the grammar has more than {MAX_GRAMMAR_BYTES} characters", code="invalid_grammar")
        key = hashlib.sha256(request.grammar.encode("utf-8", "surrogatepass")).digest()
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._copies(self._cache[key][0], request.num_choices)
        if len(self._by_request) >= MAX_COMPILING:
            raise OverloadedError("too many grammars are being compiled at the moment", retry_after_s=1.0)
        if key not in self._jobs:
            self._jobs[key] = _Job(request.grammar, self._thread.submit(self._compile, key, request.grammar))
        self._jobs[key].waiting[request.request_id] = Waiting(request, now)
        self._by_request[request.request_id] = key
        return None

    def is_waiting(self, request_id: str) -> bool:
        return request_id in self._by_request

    def abort(self, request_id: str, choice: int | None) -> tuple[Waiting, list[int]] | None:
        """Ends choices of a request that waits: itself and the choices that were open and are named. None when it does not wait."""
        key = self._by_request.get(request_id)
        if key is None:
            return None
        waiting = self._jobs[key].waiting[request_id]
        named = [index for index in range(waiting.request.num_choices) if choice in (None, index) and index not in waiting.ended]
        waiting.ended.update(named)
        if len(waiting.ended) == waiting.request.num_choices:
            self._forget(request_id)
        return waiting, named

    def expire(self, now: float) -> list[tuple[Waiting, list[int]]]:
        """The requests whose time is over, and their open choices; they are forgotten."""
        late = [
            request_id
            for request_id, key in self._by_request.items()
            if (deadline := self._jobs[key].waiting[request_id].deadline) is not None and deadline <= now
        ]
        return [ended for request_id in late if (ended := self.abort(request_id, None)) is not None]

    def settle(self) -> list[tuple[Waiting, list[Constraint] | BraidError]]:
        """The requests whose grammars are ready, with a constraint per choice or the error that ends them."""
        settled: list[tuple[Waiting, list[Constraint] | BraidError]] = []
        while self._done:
            key, result = self._done.popleft()
            job = self._jobs.pop(key)
            if not isinstance(result, BraidError):
                self._keep(key, result, _BASE_BYTES + _BYTES_PER_BYTE * len(job.text))
            for request_id, waiting in job.waiting.items():
                del self._by_request[request_id]
                settled.append((waiting, self._outcome(result, waiting.request.num_choices)))
        return settled

    def close(self) -> None:
        """Nothing more is compiled but what has begun, so that the process can end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _outcome(self, result: LLMatcher | BraidError, num_choices: int) -> list[Constraint] | BraidError:
        if isinstance(result, BraidError):
            return result
        try:
            return self._copies(result, num_choices)
        except BaseException:
            log.exception("a grammar could not be copied")
            return EngineError("the engine could not prepare the grammar")

    @staticmethod
    def _copies(matcher: LLMatcher, num_choices: int) -> list[Constraint]:
        return [Constraint(matcher.deep_copy()) for _ in range(num_choices)]

    def _keep(self, key: bytes, matcher: LLMatcher, size: int) -> None:
        if size > self._max_bytes:
            return  # all others would have to go for it
        self._cache[key] = (matcher, size)
        self._cache_bytes += size
        while len(self._cache) > self._max_grammars or self._cache_bytes > self._max_bytes:
            _, (_, freed) = self._cache.popitem(last=False)
            self._cache_bytes -= freed

    def _forget(self, request_id: str) -> None:
        key = self._by_request.pop(request_id)
        job = self._jobs[key]
        del job.waiting[request_id]
        if not job.waiting and job.future.cancel():  # one that has begun ends by itself and is kept
            del self._jobs[key]

    # In the compiling thread

    def _learn(self, vocabulary: Vocabulary) -> None:
        try:
            self._tokenizer = make_tokenizer(vocabulary, self._vocab_size)
        except BaseException:
            log.exception("the vocabulary of %s can't be used for grammars", vocabulary.model)

    def _compile(self, key: bytes, text: str) -> None:
        result: LLMatcher | BraidError
        try:
            if self._tokenizer is None:
                result = EngineError("grammars can't be used with this model")
            else:
                result = compile_grammar(self._tokenizer, text)
        except BraidError as error:
            result = error
        except BaseException:  # the library's own panics are no Exception
            log.exception("a grammar could not be compiled")
            result = EngineError("the engine could not compile the grammar")
        self._done.append((key, result))
        self._on_ready()
