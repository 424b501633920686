"""From a checked request to running sequences: the model, its limits and sampling defaults, the encoding, the submission.

Shared by the text routes; knows no HTTP and no JSON. What comes back is a `Generation`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from service.api.auth import salted
from service.api.generation import Choice, Generation
from service.api.schema import SamplingFields
from service.codec.prompt import Codec
from service.codec.text import StopStrings, TextStream
from service.engine.client import EngineClient
from service.engine.messages import Generate, ModelInfo
from service.engine.stream import Stream
from service.errors import ContextLengthError, ModelNotFoundError, OverloadedError, RequestError, UnavailableError
from service.metrics import Metrics
from service.scheduling.reading import Read
from service.scheduling.sampling import SamplingParams

# Below this many characters an encoding takes less time than going to another thread.
INLINE_CHARS = 8192
MAX_ENCODING = 128
_THREADS = 2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and when: arrival in time.monotonic's seconds."""

    tenant: str
    arrival: float


class Backend:
    """The engine, the codecs and the metrics, as the text routes use them. codecs: by model name; the first is the default of
    requests that name none. max_requests: the engine client's own limit, to tell why it refused."""

    def __init__(self, engine: EngineClient, codecs: Mapping[str, Codec], metrics: Metrics, max_requests: int) -> None:
        self.engine = engine
        self.codecs = dict(codecs)
        self._metrics = metrics
        self._max_requests = max_requests
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="encode")
        self._num_encoding = 0

    def choose(self, name: str | None) -> str:
        """The model's name. Raises: ModelNotFoundError; UnavailableError unless the engine takes requests."""
        if name is not None and name not in self.codecs:
            raise ModelNotFoundError(f"The model `{name}` does not exist or you do not have access to it.", param="model")
        name = name or next(iter(self.codecs))
        self._info(name)
        return name

    def _info(self, model: str) -> ModelInfo:
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

    def submit(
        self,
        request_id: str,
        model: str,
        prompts: list[list[int]],
        request: SamplingFields,
        caller: Caller,
        *,
        grammar: str = "",
        read: Read | None = None,
    ) -> Generation:
        """grammar: of every choice. read: of every prompt. Raises: RequestError and its kinds, OverloadedError, UnavailableError; nothing
        is left running then."""
        info = self._info(model)
        codec = self.codecs[model]
        seed = secrets.randbits(62) if request.seed is None else request.seed
        every = [sampling_params(request, codec, info, len(prompt), seed) for prompt in prompts]
        streams: list[Stream] = []
        try:
            for index, (prompt, sampling) in enumerate(zip(prompts, every, strict=True)):
                generate = Generate(
                    request_id=f"{request_id}-{index}",
                    model=model,
                    prompt=prompt,
                    sampling=sampling,
                    num_choices=request.n,
                    priority=request.priority,
                    timeout_s=request.timeout or 0.0,
                    tenant=salted(caller.tenant, request.cache_salt),
                    grammar=grammar,
                    read=read,
                )
                streams.append(self.engine.submit(generate))
                self._metrics.begin(
                    generate.request_id, model, arrival=caller.arrival, num_choices=request.n, max_tokens=sampling.max_tokens
                )
        except BaseException as error:
            for stream in streams:
                stream.leave()
            if isinstance(error, OverloadedError):
                is_full = self.engine.num_in_flight >= self._max_requests
                self._metrics.reject(model, "max_num_queued_reqs" if is_full else "max_num_queued_tokens")
            raise
        return Generation(streams, _choices(streams, codec, request), caller.arrival)


def _choices(streams: list[Stream], codec: Codec, request: SamplingFields) -> list[Choice]:
    """In the order of OpenAI's indexes: prompt * n + choice."""

    def aborter(stream: Stream, number: int) -> Callable[[], None]:
        return lambda: stream.abort(number, finished=True)

    own_stops = frozenset(request.stop_token_ids)
    stops = StopStrings(request.stop)
    return [
        Choice(
            index * request.n + number,
            TextStream(codec.tokenizer, stops, request.include_stop_str_in_output),
            own_stops,
            aborter(stream, number),
        )
        for index, stream in enumerate(streams)
        for number in range(request.n)
    ]


def context_of(info: ModelInfo) -> int:
    """The longest sequence that can run: what the model allows, or less where its K/V pool is smaller."""
    return min(info.max_context, info.kv_tokens)


def sampling_params(request: SamplingFields, codec: Codec, info: ModelInfo, prompt_len: int, seed: int) -> SamplingParams:
    """Raises: ContextLengthError; RequestError for ids outside the vocabulary."""
    max_tokens = _max_tokens(request, context_of(info), prompt_len)
    vocab_size = min(codec.vocab_size, info.vocab_size)
    logit_bias = tuple((int(token), bias) for token, bias in request.logit_bias.items())
    _check_ids("logit_bias", (token for token, _ in logit_bias), vocab_size)
    _check_ids("stop_token_ids", request.stop_token_ids, vocab_size)

    def number(name: str, usual: float) -> float:
        given = getattr(request, name)
        return float(codec.sampling_defaults.get(name, usual) if given is None else given)

    eos_ids = () if request.ignore_eos else codec.eos_ids
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=number("temperature", 1.0),
        top_k=max(int(number("top_k", 0)), 0),
        top_p=number("top_p", 1.0),
        min_p=number("min_p", 0.0),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=number("repetition_penalty", 1.0),
        seed=seed,
        min_tokens=request.min_tokens,
        stop_ids=tuple(dict.fromkeys((*eos_ids, *request.stop_token_ids))),
        logit_bias=logit_bias,
        logprobs=request.num_logprobs,
    )


def _max_tokens(request: SamplingFields, context: int, prompt_len: int) -> int:
    wanted = request.wanted_tokens
    room = context - prompt_len
    if room < 1 or (wanted is not None and wanted > room):
        asked = prompt_len + (wanted or 1)
        completion = f"{wanted} in the completion" if wanted else "at least 1 in the completion"
        raise ContextLengthError(
            f"This model's maximum context length is {context} tokens. However, you requested {asked} tokens ({prompt_len} in the prompt, "
            f"{completion}). Please reduce the length of the prompt or of the completion.",
            param=request.prompt_param if room < 1 else request.wanted_param,
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
