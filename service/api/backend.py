"""From a checked request to running sequences: the model, its limits and sampling defaults, the encoding, the submission.

Shared by the text routes; knows no HTTP and no JSON. What comes back is a `Generation`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from service.api.auth import salted
from service.api.choice import Choice, Echo, PictureReader, Reply
from service.api.generation import Generation
from service.api.schema import SamplingFields
from service.codec.prompt import Codec
from service.codec.text import StopStrings, TextStream
from service.engine.client import EngineClient
from service.engine.messages import Generate, ModelInfo, Picture, Vocabulary
from service.engine.stream import Stream
from service.errors import ContextLengthError, ModelNotFoundError, OverloadedError, RequestError, UnavailableError
from service.metrics import Metrics
from service.scheduling.picture_grammar import PictureRule
from service.scheduling.reading import Read
from service.scheduling.sampling import SamplingParams
from service.vocabulary import PictureIds

# Below this many characters an encoding takes less time than going to another thread.
INLINE_CHARS = 8192
MAX_ENCODING = 128
_THREADS = 2

T = TypeVar("T")
PLAIN = Reply()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and when: arrival in time.monotonic's seconds. priority: work that can wait has one."""

    tenant: str
    arrival: float
    priority: int = 0

    def rank(self, priority: int) -> int:
        """A request's own priority among the caller's: whatever it asks for, what can wait stays behind what can't."""
        most = self.priority // 2
        return self.priority + max(-most, min(priority, most)) if self.priority else priority


@dataclass(frozen=True, slots=True)
class Terms:
    """Under which terms prompts are continued. grammar: what every choice follows, "" for nothing; grammar_param: the field that asked
    for it. reads: what to tell about each prompt, none at all when empty. reply: how the text is read. echoes: what comes before the text
    of each prompt's choices, nothing when empty. show: makes a file of a picture's codes, where the answer may have some; marks: which
    ids codes are."""

    grammar: str = ""
    grammar_param: str | None = None
    reads: Sequence[Read | None] = ()
    reply: Reply = PLAIN
    echoes: Sequence[Echo | None] = ()
    show: Callable[[tuple[int, ...]], Awaitable[bytes]] | None = None
    marks: PictureIds | None = None


class Backend:
    """The engine, the codecs and the metrics, as the text routes use them. codecs: by model name; the first is the default of
    requests that name none. max_requests: the engine client's own limit, to tell why it refused."""

    def __init__(self, engine: EngineClient, codecs: Mapping[str, Codec], metrics: Metrics, max_requests: int) -> None:
        self.engine = engine
        self.codecs = dict(codecs)
        self._longest_piece = {name: max(map(len, codec.tokenizer.pieces), default=1) for name, codec in self.codecs.items()}
        self._metrics = metrics
        self._max_requests = max_requests
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="encode")
        self._num_encoding = 0

    def choose(self, name: str | None, *, generates: bool = False, draws: bool = False) -> str:
        """The model's name; without one the default, or with `generates` the first that makes text, with `draws` the first that reads and
        draws pictures.

        Raises: ModelNotFoundError; RequestError for a model that can't; UnavailableError unless the engine takes requests.
        """
        if name is not None and name not in self.codecs:
            raise ModelNotFoundError(f"The model `{name}` does not exist or you do not have access to it.", param="model")
        if name is None:
            infos = self.engine.models()
            usable = (each for each in self.codecs if not generates or each not in infos or infos[each].can_generate)
            if draws:
                usable = (each for each in self.codecs if each in infos and infos[each].picture_pixels)
            name = next(usable, next(iter(self.codecs)))
        if draws and not self.info(name).picture_pixels:
            raise RequestError(f"the model {name} can't read or draw pictures", param="model", code="unsupported_model")
        if not self.info(name).can_generate and generates:
            raise RequestError(f"the model {name} makes vectors and no text; use /v1/embeddings", param="model", code="unsupported_model")
        return name

    @property
    def can_draw(self) -> bool:
        """Does any model read and draw pictures?"""
        return any(info.picture_pixels for info in self.engine.models().values())

    def known(self, model: str) -> ModelInfo:
        """The same of work that was let in, which goes on while the server drains. Raises: UnavailableError before the model is there."""
        found = self.engine.models().get(model)
        return self.info(model) if found is None else found

    def info(self, model: str) -> ModelInfo:
        """Raises: UnavailableError unless the engine takes requests."""
        state = self.engine.health().state
        info = self.engine.models().get(model)
        if info is None or state != "ready":
            texts = {"stalled": "The engine is stalled at the moment.", "draining": "The server is shutting down."}
            texts["dead"] = "The engine is not running."
            raise UnavailableError(texts.get(state, "The model is still loading."), retry_after_s=2.0)
        return info

    async def encode(self, model: str, work: Callable[[], T], num_chars: int) -> T:
        """Runs an encoding, a long one in another thread so that the loop goes on. Raises: OverloadedError, and what work raises."""
        if num_chars <= INLINE_CHARS:
            return work()
        if self._num_encoding >= MAX_ENCODING:
            self._metrics.reject(model, "max_num_encoding")
            raise OverloadedError("too many long prompts are being read at the moment", retry_after_s=1.0)
        self._num_encoding += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._num_encoding -= 1

    def check_chars(self, model: str, num_chars: int, param: str) -> None:
        """A text that can't fit, however well its tokens cover it, is refused before it costs a tokenisation.

        Raises: ContextLengthError.
        """
        context = context_of(self.info(model))
        least = -(-num_chars // self._longest_piece[model])
        if least > context:
            raise ContextLengthError(
                f"This model's maximum context length is {context} tokens. However, the prompt has at least {least} tokens: "
                "the prompt is too long. Please reduce its length.",
                param=param,
            )

    def submit(
        self, request_id: str, model: str, prompts: list[list[int]], request: SamplingFields, caller: Caller, terms: Terms | None = None
    ) -> Generation:
        """Raises: RequestError and its kinds, OverloadedError, UnavailableError; nothing is left running then."""
        terms = terms or Terms()
        info = self.info(model)
        codec = self.codecs[model]
        self._check_room(prompts, request)
        seed = secrets.randbits(62) if request.seed is None else request.seed
        every = _sampling_of_each(request, codec, info, prompts, seed)
        if terms.grammar:
            self.engine.teach(model, lambda: vocabulary_of(model, codec))
        streams: list[Stream[Generate]] = []
        try:
            for index, (prompt, sampling) in enumerate(zip(prompts, every, strict=True)):
                generate = Generate(
                    request_id=f"{request_id}-{index}",
                    model=model,
                    prompt=prompt,
                    sampling=sampling,
                    num_choices=request.num_drawn,
                    priority=caller.rank(request.priority),
                    timeout_s=request.timeout or 0.0,
                    tenant=salted(caller.tenant, request.cache_salt),
                    grammar=terms.grammar,
                    grammar_param=terms.grammar_param,
                    read=terms.reads[index] if terms.reads else None,
                    pictures=PictureRule(is_free=True) if terms.marks is not None else None,
                    draft_len=info.usual_draft_len,
                )
                streams.append(self.start(generate, caller.arrival))
        except BaseException as error:
            if isinstance(error, OverloadedError):
                self.count_refusal(model, request.num_drawn)
            for stream in streams:
                stream.leave()
            raise
        choices = _choices(streams, codec, request, terms)
        return Generation(streams, choices, caller.arrival, request.n, show=terms.show, pictures=codec.pictures)

    def _check_room(self, prompts: list[list[int]], request: SamplingFields) -> None:
        """What would be refused even by an idle server is no overload: a client must not try it again for ever. Raises: RequestError."""
        num_tokens, most = sum(map(len, prompts)), self.engine.max_tokens_in_flight
        if num_tokens > most:
            raise RequestError(f"the prompt has {num_tokens} tokens in all; at most {most} are taken", param=request.prompt_param)
        if (num_choices := len(prompts) * request.num_drawn) > self._max_requests:
            param = "n" if len(prompts) == 1 else request.prompt_param
            raise RequestError(f"{num_choices} choices are asked for; at most {self._max_requests} are taken at a time", param=param)

    def start(self, wanted: Generate, arrival: float, *, is_part: bool = False) -> Stream[Generate]:
        """Sends one prompt down, counted from arrival. is_part: of work that was let in. Raises: what `EngineClient.submit` raises."""
        stream = self.engine.submit(wanted, is_part=True) if is_part else self.engine.submit(wanted)
        self._metrics.begin(
            wanted.request_id, wanted.model, arrival=arrival, num_choices=wanted.num_choices, max_tokens=wanted.sampling.max_tokens
        )
        return stream

    def start_counted(self, wanted: Generate, arrival: float, *, is_part: bool = False) -> Stream[Generate]:
        """The same, and a refusal for load is counted. Raises: what `EngineClient.submit` raises."""
        try:
            return self.start(wanted, arrival, is_part=is_part)
        except OverloadedError:
            self.count_refusal(wanted.model, wanted.num_choices)
            raise

    def start_picture(self, wanted: Picture) -> Stream[Picture]:
        """Sends pixels or codes down. Raises: what `EngineClient.submit` raises."""
        stream = self.engine.submit(wanted)
        self._metrics.begin_picture(wanted.request_id, wanted.model, "encode" if wanted.pixels else "draw")
        return stream

    def count_picture(self, model: str, arrival: float, *, is_preview: bool = False) -> None:
        """One that was asked for is done, or its first preview."""
        (self._metrics.previewed if is_preview else self._metrics.drawn)(model, arrival)

    def count_refusal(self, model: str, num_choices: int = 1) -> None:
        """The engine client had no room for a prompt with so many choices."""
        is_full = self.engine.num_in_flight + num_choices > self._max_requests
        self._metrics.reject(model, "max_num_queued_reqs" if is_full else "max_num_queued_tokens")


def _choices(streams: list[Stream[Generate]], codec: Codec, request: SamplingFields, terms: Terms) -> list[Choice]:
    """In the order of OpenAI's indexes: prompt * n + choice."""

    def aborter(stream: Stream[Generate], number: int) -> Callable[[], None]:
        return lambda: stream.abort(number, finished=True)

    own_stops = frozenset(request.stop_token_ids)
    stops = StopStrings(request.stop)
    return [
        Choice(
            index * request.num_drawn + number,
            TextStream(codec.tokenizer, stops, request.include_stop_str_in_output, shown=terms.reply.shown),
            own_stops,
            aborter(stream, number),
            terms.reply,
            has_ids=request.return_token_ids,
            echo=terms.echoes[index] if terms.echoes else None,
            pictures=PictureReader(terms.marks) if terms.marks is not None else None,
        )
        for index, stream in enumerate(streams)
        for number in range(request.num_drawn)
    ]


def vocabulary_of(model: str, codec: Codec) -> Vocabulary:
    """What the engine has to know of a model's tokens before the first grammar."""
    return Vocabulary(model, codec.tokenizer.pieces, sorted(codec.tokenizer.special.ids), list(codec.eos_ids))


def context_of(info: ModelInfo) -> int:
    """The longest sequence that can run: what the model allows, or less where its K/V pool is smaller."""
    return min(info.max_context, info.kv_tokens)


def _sampling_of_each(request: SamplingFields, codec: Codec, info: ModelInfo, prompts: list[list[int]], seed: int) -> list[SamplingParams]:
    """Raises: as `sampling_params`; of several prompts, the one that is too long is named."""
    found = []
    for index, prompt in enumerate(prompts):
        try:
            found.append(sampling_params(request, codec, info, len(prompt), seed))
        except ContextLengthError as error:
            if len(prompts) > 1 and error.param == request.prompt_param:
                error.param = f"{error.param}[{index}]"
            raise
    return found


def sampling_params(request: SamplingFields, codec: Codec, info: ModelInfo, prompt_len: int, seed: int) -> SamplingParams:
    """Raises: ContextLengthError; RequestError for ids outside the vocabulary."""
    max_tokens = _max_tokens(request, context_of(info), prompt_len)
    vocab_size = min(codec.vocab_size, info.vocab_size)
    logit_bias = tuple((int(token), bias) for token, bias in request.logit_bias.items())
    _check_ids("logit_bias", (token for token, _ in logit_bias), vocab_size)
    _check_ids("stop_token_ids", request.stop_token_ids, vocab_size)

    eos_ids = () if request.ignore_eos else codec.eos_ids
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=sampling_number(request, codec, "temperature", 1.0),
        top_k=max(int(sampling_number(request, codec, "top_k", 0)), 0),
        top_p=sampling_number(request, codec, "top_p", 1.0),
        min_p=sampling_number(request, codec, "min_p", 0.0),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=sampling_number(request, codec, "repetition_penalty", 1.0),
        seed=seed,
        min_tokens=request.min_tokens,
        stop_ids=tuple(dict.fromkeys((*eos_ids, *request.stop_token_ids))),
        logit_bias=logit_bias,
        # A ranking needs the likelihoods even where the client does not.
        logprobs=0 if request.num_logprobs is None and request.num_drawn > request.n else request.num_logprobs,
    )


def sampling_number(request: object, codec: Codec, name: str, usual: float) -> float:
    """What a request says of it, else the model's own default, else what turns it off."""
    given = getattr(request, name)
    return float(codec.sampling_defaults.get(name, usual) if given is None else given)


def _max_tokens(request: SamplingFields, context: int, prompt_len: int) -> int:
    wanted = request.wanted_tokens
    room = context - prompt_len
    least = 1 if wanted is None else wanted
    if least > room:
        completion = "at least 1 in the completion" if wanted is None else f"{wanted} in the completion"
        # Clients know this error by its words: LiteLLM and aider by the first sentence, LangChain by "prompt is too long".
        raise ContextLengthError(
            f"This model's maximum context length is {context} tokens. However, you requested {prompt_len + least} tokens ({prompt_len} in "
            f"the prompt, {completion}): the prompt is too long for that. Please reduce the length of the prompt or of the completion.",
            param=request.prompt_param if room < min(least, 1) else request.wanted_param,
        )
    if wanted is None:
        wanted = min(room, request.default_tokens or room)
        if request.min_tokens > wanted:
            raise RequestError(f"min_tokens must be at most {wanted} here", param="min_tokens")
    return wanted


def _check_ids(param: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if token >= vocab_size:
            raise RequestError(f"{param} has the id {token}; the vocabulary has ids 0 to {vocab_size - 1}", param=param)
