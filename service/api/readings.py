"""Prompts that are only read: many of them at once, for vectors or log-probabilities, with what they cost together.

Shared by embeddings, rerank, score and classify; knows no HTTP beyond the client going away, and no JSON. Nothing is generated here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from service.api.auth import salted
from service.api.backend import Backend, Caller, context_of
from service.engine.messages import Event, Generate, Reading
from service.engine.stream import Stream, error_of
from service.errors import BraidError, ContextLengthError, EngineError, OverloadedError, UnavailableError
from service.scheduling.reading import Read
from service.scheduling.sampling import SamplingParams

# Of one HTTP request: enough to fill every step, and far below what the server admits in all, so that others still come in.
MOST_IN_FLIGHT = 64
MOST_TOKENS_IN_FLIGHT = 65_536
# How long a request that is under way, and has nothing in flight, goes on asking a full server for a place.
PATIENCE_S = 30.0
_RETRY_S = 0.05

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PromptReadings:
    """readings: one per prompt, in order. prompt_tokens: of all prompts; cached_tokens: how many of them the prefix cache had."""

    readings: list[Reading]
    prompt_tokens: int
    cached_tokens: int


async def read_prompts(
    backend: Backend,
    model: str,
    prompts: Sequence[list[int]],
    read: Read | Sequence[Read],
    caller: Caller,
    request_id: str,
    *,
    concurrency: int = MOST_IN_FLIGHT,
    param: str = "input",
    priority: int = 0,
    timeout_s: float = 0.0,
    cache_salt: str | None = None,
) -> PromptReadings:
    """Reads every prompt, at most `concurrency` of them at a time; read: one for all, or one each. model: as `Backend.choose` gave it.
    param: the field that an error about a prompt names. timeout_s: of each prompt, from when it is sent; 0 is none.

    When one fails, or the caller is cancelled, the rest is aborted. A server that is full refuses at once, but only the first prompt:
    the others wait for a place. Raises: RequestError, ContextLengthError, DeadlineError, OverloadedError, UnavailableError, EngineError.
    """
    reads = [read] * len(prompts) if isinstance(read, Read) else list(read)
    _check(backend, model, prompts, reads, param)
    tenant = salted(caller.tenant, cache_salt)
    wanted = [
        Generate(
            request_id=f"{request_id}-{index}",
            model=model,
            prompt=prompt,
            sampling=SamplingParams(max_tokens=0, temperature=0.0),
            priority=caller.rank(priority),
            timeout_s=timeout_s,
            tenant=tenant,
            read=one,
        )
        for index, (prompt, one) in enumerate(zip(prompts, reads, strict=True))
    ]
    return await _Crowd(backend, caller, wanted, max(concurrency, 1)).run()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away. The request's body must have been read.

    Raises: ClientDisconnect; what work raises.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check(backend: Backend, model: str, prompts: Sequence[list[int]], reads: Sequence[Read], param: str) -> None:
    """Before anything is sent, so that a request with one bad prompt costs nothing. Raises: ContextLengthError; ValueError."""
    context = context_of(backend.info(model))
    for index, (prompt, read) in enumerate(zip(prompts, reads, strict=True)):
        if len(prompt) > context:
            where = f"{param}[{index}]" if len(prompts) > 1 else param
            raise ContextLengthError(
                f"This model's maximum context length is {context} tokens, and {where} has {len(prompt)} tokens. Please make it shorter.",
                param=param,
            )
        read.check(len(prompt))


class _Crowd:
    """The prompts of one HTTP request on their way through the engine."""

    def __init__(self, backend: Backend, caller: Caller, wanted: Sequence[Generate], concurrency: int) -> None:
        self._backend = backend
        self._caller = caller
        self._wanted = wanted
        self._concurrency = concurrency
        self._open: dict[int, Stream[Generate]] = {}
        self._num_open_tokens = 0
        self._readings: list[Reading | None] = [None] * len(wanted)
        self._cached_tokens = 0
        self._ended = asyncio.Event()

    async def run(self) -> PromptReadings:
        try:
            async with asyncio.TaskGroup() as group:
                for index, wanted in enumerate(self._wanted):
                    await self._wait_for_room(len(wanted.prompt))
                    self._open[index] = await self._start(index, wanted)
                    self._num_open_tokens += len(wanted.prompt)
                    group.create_task(self._collect(index))
        except BaseExceptionGroup as errors:
            # The rest fell because of the first.
            raise next((error for error in errors.exceptions if isinstance(error, BraidError)), errors.exceptions[0]) from None
        finally:
            for stream in self._open.values():
                stream.leave()
        readings = [reading for reading in self._readings if reading is not None]
        return PromptReadings(readings, sum(len(wanted.prompt) for wanted in self._wanted), self._cached_tokens)

    async def _wait_for_room(self, prompt_len: int) -> None:
        while self._open and (len(self._open) >= self._concurrency or self._num_open_tokens + prompt_len > MOST_TOKENS_IN_FLIGHT):
            await self._wait_for_an_end(None)

    async def _start(self, index: int, wanted: Generate) -> Stream[Generate]:
        loop = asyncio.get_running_loop()
        give_up = loop.time() + PATIENCE_S
        while True:
            try:
                return self._backend.start(wanted, self._caller.arrival)
            except OverloadedError:
                if index == 0 or (not self._open and loop.time() >= give_up):
                    self._backend.count_refusal(wanted.model)
                    raise
            await self._wait_for_an_end(_RETRY_S)

    async def _wait_for_an_end(self, timeout_s: float | None) -> None:
        self._ended.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), timeout_s)

    async def _collect(self, index: int) -> None:
        """One prompt's events to its end. Mutates: readings, the count of cached tokens. Raises: the error that ended it."""
        async for event in self._open[index]:
            if event.reading is not None:
                self._readings[index] = event.reading
            if event.finish is not None:
                self._finish(index, event)
        del self._open[index]
        self._num_open_tokens -= len(self._wanted[index].prompt)
        self._ended.set()

    def _finish(self, index: int, event: Event) -> None:
        if (error := error_of(event)) is not None:
            raise error
        if event.finish == "abort":
            raise UnavailableError("The request was aborted.")
        if self._readings[index] is None:
            raise EngineError("the engine gave no reading of a prompt")
        if event.usage is not None:
            self._cached_tokens += event.usage.cached_tokens
