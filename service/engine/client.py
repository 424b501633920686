"""The HTTP process's side of the engine: starts its process, admits requests, hands events to their streams, and knows how it fares.

All of it runs in one asyncio loop and nothing blocks. No HTTP, no text; nothing here may import torch. Used by `service/__main__.py`
and the API. A request's own side is `stream.py`, counting `admission.py`, stalls `vitals.py`; what is left is one long class because
submit, delivery, drain and death all end or begin entries of one table of streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from service.engine.admission import Admission
from service.engine.mailbox import MAX_UNSENT_BYTES, FrameError, Line
from service.engine.messages import (
    MAX_CHOICES,
    Abort,
    Beat,
    Delivery,
    Event,
    Failed,
    Generate,
    LaneStats,
    Load,
    ModelInfo,
    Picture,
    Progress,
    Ready,
    Shutdown,
    Up,
    Usage,
    Vocabulary,
)
from service.engine.stream import R, Stream
from service.engine.vitals import IDLE, Vitals
from service.errors import BraidError, ModelNotFoundError, OverloadedError, RequestError, StartupError, UnavailableError

log = logging.getLogger("braid.client")

State = Literal["loading", "ready", "stalled", "draining", "dead"]
WORKER = (sys.executable, "-m", "service.worker")

MAX_PICTURES = 4096
_TICK_S = 0.25
_EXIT_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Health:
    """detail: one line for people. progress: of start-up, 0 ... 1."""

    state: State
    detail: str
    progress: float


class EngineClient:
    """One engine process and its requests.

    max_requests_in_flight counts requests; max_tokens_in_flight their prompt and generated tokens. stall_exit_s: an engine
    that is stalled for so long is given up for dead; 0 waits for ever. command: what to start, `--fd N` is appended.
    on_delivery: called with each delivery after its events have reached their streams, also with the ones this side makes up
    when the engine dies or the drain is over, and without events that come too late: who counts ends sees each exactly once.
    """

    def __init__(
        self,
        load: Load,
        *,
        max_requests_in_flight: int = 256,
        max_tokens_in_flight: int = 1_000_000,
        stall_exit_s: float = 0.0,
        command: Sequence[str] = WORKER,
    ) -> None:
        self.dead = asyncio.Event()
        self.on_delivery: list[Callable[[Delivery], None]] = []
        self._load = load
        self.max_tokens_in_flight = max_tokens_in_flight
        self._admission = Admission(max_requests=max_requests_in_flight, max_tokens=max_tokens_in_flight)
        self._stall_exit_s = stall_exit_s
        self._command = tuple(command)
        self._streams: dict[str, Stream[Any]] = {}
        self._num_pictures = 0
        self._models: dict[str, ModelInfo] = {}
        self._stats: dict[str, LaneStats] = {}
        self._progress = Progress(phase="starting", fraction=0.0)
        self._taught: set[str] = set()
        self._detail = ""
        self._vitals = Vitals()
        self._is_draining = False
        self._is_closing = False
        self._process: Process | None = None
        self._line: Line | None = None
        self._watch: asyncio.Task[None] | None = None
        self._is_settled = asyncio.Event()  # ready or dead
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    # Life of the process

    async def start(self) -> None:
        """Starts the engine and waits until it is ready. `health()` tells how far it is meanwhile.

        Raises: StartupError with the engine's own words.
        """
        self._line = Line(on_message=self._on_message, on_lost=self._on_lost)
        self._process = await self._spawn(self._line)
        self._watch = asyncio.create_task(self._watch_process(self._process), name="engine-watch")
        self._line.send(self._load)
        await self._is_settled.wait()
        if self.dead.is_set() or self._is_closing:
            raise StartupError(self._detail or "the engine was closed while it was loading")

    async def _spawn(self, line: Line) -> Process:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                # A process group of its own: Ctrl-C in a terminal is for the server, which then drains.
                process = await asyncio.create_subprocess_exec(
                    *self._command, "--fd", str(theirs.fileno()), stdin=DEVNULL, pass_fds=(theirs.fileno(),), process_group=0
                )
                await asyncio.get_running_loop().create_unix_connection(lambda: line, sock=ours)
            except OSError as error:
                ours.close()
                self._die("the engine process could not be started")
                raise StartupError(self._detail) from error
            except BaseException:
                ours.close()
                raise
        return process

    async def drain(self, timeout_s: float) -> bool:
        """Takes nothing new and waits for what is running; what is left after timeout_s ends with an error. True: all finished."""
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_idle.wait(), timeout_s)
        if self._is_idle.is_set():
            return True
        for stream in self._streams.values():
            stream.abort()
        self._end_streams("The server is shutting down.", UnavailableError.status)
        return False

    async def close(self) -> None:
        """Ends the engine process, politely where it listens. Open streams end with an error. May be called more than once."""
        self._is_draining = self._is_closing = True
        self._end_streams("The server is shutting down.", UnavailableError.status)
        self._is_settled.set()
        wait_s = 0.0
        if self._line is not None and self._models and not self.dead.is_set() and not self._vitals.is_stalled:
            self._line.send(Shutdown())
            wait_s = _EXIT_WAIT_S
        await self._end_process(wait_s)
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self._line is not None:
            self._line.close()
            await asyncio.sleep(0)  # the transport closes its socket in the loop's next turn

    # Questions

    def models(self) -> dict[str, ModelInfo]:
        """By name; empty until the engine is ready."""
        return self._models

    def stats(self) -> dict[str, LaneStats]:
        """The newest of each model."""
        return self._stats

    @property
    def num_in_flight(self) -> int:
        return self._admission.num_requests

    @property
    def tokens_in_flight(self) -> int:
        return self._admission.num_tokens

    def health(self) -> Health:
        if self.dead.is_set():
            return Health("dead", self._detail, 0.0)
        if self._is_draining:
            return Health("draining", f"{len(self._streams)} requests are being finished", 1.0)
        if not self._models:
            return Health("loading", self._progress.phase, self._progress.fraction)
        if self._vitals.is_stalled:
            return Health("stalled", f"no step was finished for {self._vitals.step_age_s:.0f} s", 1.0)
        return Health("ready", "", 1.0)

    @property
    def num_stalls(self) -> int:
        """Since the start."""
        return self._vitals.num_stalls

    # Requests

    def submit(self, request: R, *, is_part: bool = False) -> Stream[R]:
        """Hands a request to the engine. request_id must be new. is_part: of work that was let in, which may be finished while the server
        drains; a picture always is, and only their number is bounded.

        Raises: ModelNotFoundError, RequestError; OverloadedError when too much is in flight; UnavailableError unless ready.
        """
        line = self._require_ready(is_part=is_part or isinstance(request, Picture))
        if request.model not in self._models:
            raise ModelNotFoundError(f"The model `{request.model}` does not exist or you do not have access to it.", param="model")
        if not 1 <= request.num_choices <= MAX_CHOICES:
            raise RequestError(f"n must be between 1 and {MAX_CHOICES}", param="n")
        if isinstance(request, Generate) and request.grammar and request.model not in self._taught:
            raise ValueError(f"the vocabulary of {request.model!r} has not been sent")
        if request.request_id in self._streams:
            raise ValueError(f"request_id {request.request_id!r} is in flight already")
        if isinstance(request, Generate):
            self._admission.check(request.num_prompt_tokens, request.num_choices)
        elif self._num_pictures >= MAX_PICTURES:
            raise OverloadedError("too many pictures are being read and drawn at the moment", retry_after_s=1.0)
        try:
            line.send(request)
        except (FrameError, OverflowError, TypeError, ValueError) as error:
            raise RequestError("the request holds a number or a length that is out of range") from error
        stream = Stream(request, self._send_abort)
        if isinstance(request, Generate):
            self._admission.enter(request.request_id, request.num_prompt_tokens, time.monotonic(), request.num_choices)
        else:
            self._num_pictures += 1
        self._streams[request.request_id] = stream
        self._is_idle.clear()
        return stream

    def teach(self, model: str, vocabulary: Callable[[], Vocabulary]) -> None:
        """Sends a model's vocabulary to the engine, where that has not been done; to be called before the first request with a
        grammar. Raises: UnavailableError unless ready."""
        line = self._require_ready()
        if model not in self._taught:
            line.send(vocabulary())
            self._taught.add(model)

    def _require_ready(self, *, is_part: bool = False) -> Line:
        health = self.health()
        line = self._line
        allowed = ("ready", "draining", "stalled") if is_part else ("ready",)
        if health.state not in allowed or self._is_closing or line is None:
            texts = {
                "loading": "The model is still loading.",
                "stalled": "The engine is stalled at the moment.",
                "draining": "The server is shutting down.",
            }
            raise UnavailableError(texts.get(health.state, "The engine is not running."), retry_after_s=2.0)
        if line.unsent_bytes > MAX_UNSENT_BYTES:
            raise UnavailableError("The engine does not take requests at the moment.", retry_after_s=2.0)
        return line

    def _send_abort(self, request_id: str, choice: int | None, finished: bool) -> None:
        if self._line is not None:
            self._line.send(Abort(request_id, choice, finished))

    # What comes up

    def _on_message(self, message: Up) -> None:
        self._vitals.hear(message if isinstance(message, Beat) else None)
        match message:
            case Delivery():
                self._vitals.hear(IDLE)  # it ended a step; the next beat tells about the next one
                self._on_delivery(message)
            case Progress():
                self._progress = message
            case Ready():
                self._models = {info.name: info for info in message.models}
                self._is_settled.set()
            case Failed():
                self._die(message.message)

    def _on_delivery(self, delivery: Delivery) -> None:
        events = [event for event in delivery.events if self._hand_out(event)]
        if len(events) < len(delivery.events):
            delivery = msgspec.structs.replace(delivery, events=events)
        for stats in delivery.stats:
            self._stats[stats.model] = stats
        for callback in self.on_delivery:
            try:
                callback(delivery)
            except Exception:
                log.exception("a listener to deliveries failed")

    def _hand_out(self, event: Event) -> bool:
        """False for an event that comes after its choice was ended here."""
        stream = self._streams.get(event.request_id)
        if stream is None or not stream.push(event):
            return False
        if isinstance(stream.request, Generate):
            self._admission.grow(event.request_id, len(event.tokens))
        if stream.is_finished:
            self._forget(stream)
        return True

    def _forget(self, stream: Stream[Any]) -> None:
        del self._streams[stream.request.request_id]
        if isinstance(stream.request, Generate):
            self._admission.leave(stream.request.request_id, time.monotonic())
        else:
            self._num_pictures -= 1
        if not self._streams:
            self._is_idle.set()

    def _end_streams(self, reason: str, status: int) -> None:
        """Ends every open choice here, because the engine will not."""
        events = [
            Event(
                stream.request.request_id,
                choice,
                [],
                finish="error",
                usage=Usage(stream.request.num_prompt_tokens, 0, 0, 0.0, 0.0, 0.0),
                error=reason,
                error_status=status,
            )
            for stream in self._streams.values()
            for choice in sorted(stream.open_choices)
        ]
        if events:
            self._on_delivery(Delivery(events=events, stats=[]))

    # Death and stalls

    def _on_lost(self) -> None:
        if not self._is_closing:
            self._die("the engine process ended unexpectedly")

    def _die(self, detail: str) -> None:
        if self.dead.is_set() or self._is_closing:
            return
        self._detail = detail
        self.dead.set()
        log.error("the engine is dead: %s", detail)
        self._end_streams("The engine stopped while it worked on this request.", BraidError.status)
        self._is_settled.set()
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _watch_process(self, process: Process) -> None:
        """Counts silence in its own ticks, so that time in which this loop itself stood still is not held against the engine."""
        exited = asyncio.create_task(process.wait())
        try:
            while not exited.done():
                await asyncio.wait({exited}, timeout=_TICK_S)
                if self._models and not exited.done():
                    self._tick()
        finally:
            exited.cancel()
        # What it said last may still lie in the socket.
        await asyncio.sleep(_TICK_S)
        self._die(f"the engine process ended unexpectedly (status {process.returncode})")

    def _tick(self) -> None:
        vitals = self._vitals
        stalled_s, num_stalls = vitals.stalled_s, vitals.num_stalls
        vitals.wait(_TICK_S)
        if vitals.num_stalls > num_stalls:
            log.error("the engine is stalled: no step was finished for %.1f s", vitals.step_age_s)
        elif stalled_s and not vitals.stalled_s:
            log.warning("the engine goes on after a stall of about %.0f s", stalled_s)
        if vitals.is_stalled and self._stall_exit_s and vitals.step_age_s >= self._stall_exit_s:
            self._die(f"the engine was stalled for more than {self._stall_exit_s:g} s")

    async def _end_process(self, wait_s: float) -> None:
        """Waits so long for it to exit by itself, then kills it."""
        if self._process is None:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), wait_s)
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
