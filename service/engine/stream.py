"""One request as the HTTP process sees it: an iteration over its events that aborts the request when it is left early.

Filled by the engine client, read by one coroutine of the API. No socket, no process, no torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Generic, TypeVar

import msgspec

from service.engine.messages import Event, Generate, Picture
from service.errors import (
    BraidError,
    DeadlineError,
    EngineError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    UnavailableError,
)

R = TypeVar("R", bound=Generate | Picture)


class Stream(Generic[R]):
    """The events of all choices of one request. Iterate once: by event, or with `batches()` by what one delivery brought.

    The last event of each choice has `finish` set; after the last choice's the iteration ends. Ways of failure are events too
    (`finish` "error" or "deadline"; `error_of` gives the exception that fits), so a reader has one road. Leaving the iteration
    early, by `break`, an exception or cancellation, aborts what is still running.
    """

    def __init__(self, request: R, abort: Callable[[str, int | None, bool], None]) -> None:
        self.request = request
        self.num_generated = 0
        self._send_abort = abort
        self._open_choices = set(range(request.num_choices))
        self._aborted: set[int] = set()
        self._pending: list[Event] = []
        self._waiter: asyncio.Future[None] | None = None
        self._is_left = False

    @property
    def is_finished(self) -> bool:
        return not self._open_choices

    @property
    def open_choices(self) -> frozenset[int]:
        return frozenset(self._open_choices)

    def abort(self, choice: int | None = None, finished: bool = False) -> None:
        """Asks the engine to end one choice, or all; its last event still comes. `finished`: a stop string was met, so the end
        counts as "stop". Once per choice: more are ignored."""
        wanted = self._open_choices - self._aborted
        if choice is not None:
            wanted &= {choice}
        if wanted:
            self._aborted |= wanted
            self._send_abort(self.request.request_id, choice, finished)

    async def batches(self) -> AsyncGenerator[list[Event], None]:
        """Lists of events, never empty: everything that has come since the last one."""
        try:
            while self._pending or self._open_choices:
                if not self._pending:
                    self._waiter = asyncio.get_running_loop().create_future()
                    await self._waiter
                events, self._pending = self._pending, []
                yield events
        finally:
            self.leave()

    def leave(self) -> None:
        """Nobody reads any more: aborts what runs and keeps nothing. For a reader that may never have begun to iterate."""
        self._is_left = True
        self._pending = []
        self.abort()

    async def __aiter__(self) -> AsyncIterator[Event]:
        batches = self.batches()
        try:
            async for events in batches:
                for event in events:
                    yield event
        finally:
            await batches.aclose()

    def push(self, event: Event) -> bool:
        """Takes in an event of this request; False when its choice has already ended (it is dropped then)."""
        if event.choice not in self._open_choices:
            return False
        if event.finish is not None:
            self._open_choices.remove(event.choice)
        self.num_generated += len(event.tokens)
        if not self._is_left:
            self._pending.append(self._placed(event))
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)
        return True

    def _placed(self, event: Event) -> Event:
        """Of what has begun, only its grammar can still be the client's fault; the scheduler does not know the field's name."""
        if event.finish != "error" or event.error_status != RequestError.status or event.error_param is not None:
            return event
        return msgspec.structs.replace(event, error_param=self.request.grammar_param)


def error_of(event: Event) -> BraidError | None:
    """The error that a terminal event stands for; None for any other event."""
    if event.finish == "deadline":
        return DeadlineError("the request's time was over before it was finished")
    if event.finish != "error":
        return None
    kinds: dict[int, type[BraidError]] = {400: RequestError, 404: ModelNotFoundError, 429: OverloadedError, 503: UnavailableError}
    kind = kinds.get(event.error_status, EngineError)
    return kind(event.error or "the engine failed", param=event.error_param, code=event.error_code)
