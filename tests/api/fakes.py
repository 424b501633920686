"""Stand-ins for the API's tests: an engine that plays a script into real streams, and a codec whose tokens are bytes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI

from service.__main__ import Server, listen, make_server
from service.api.app import Limits, build_app
from service.codec.prompt import Codec
from service.engine.client import Health
from service.engine.messages import Delivery, Event, Generate, LaneStats, ModelInfo, TokenLogprob, Usage
from service.engine.stream import Stream
from service.errors import BraidError, RequestError
from service.metrics import Metrics

MODEL = "tiny/bytes"
EOS = 256
OTHER_STOP = 257
VOCAB = 258
CONTEXT = 2048
TEXT = "Grüße, wörld! 👋🏽 Stop here. And on."


class ByteTokenizer:
    """Ids 0 to 255 are bytes; two special ids have a spelling and no text."""

    vocab_size = VOCAB
    special = {EOS: b"<|end|>", OTHER_STOP: b"<|other|>"}  # noqa: RUF012

    def token_bytes(self, token: int, *, skip_special: bool = True) -> bytes:
        if token in self.special:
            return b"" if skip_special else self.special[token]
        return bytes([token])


@dataclass
class ByteCodec:
    name: str = MODEL
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)
    template: None = None
    sampling_defaults: dict[str, float | int] = field(default_factory=lambda: {"temperature": 0.6, "top_k": 40})
    max_context: int = CONTEXT
    eos_ids: tuple[int, ...] = (EOS,)
    vocab_size: int = VOCAB
    encode_thread: str = ""

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **others: object) -> list[int]:
        self.encode_thread = threading.current_thread().name
        if any(message.get("content") == "refuse me" for message in messages):
            raise RequestError("the template refuses", param="messages")
        return list("".join(f"{message['role']}:{message.get('content', '')}\n" for message in messages).encode())

    def encode_text(self, prompt: str) -> list[int]:
        self.encode_thread = threading.current_thread().name
        return list(prompt.encode())

    def check_ids(self, ids: Sequence[int]) -> None:
        Codec.check_ids(self, ids)  # type: ignore[arg-type]


@dataclass
class Script:
    """What the engine does with a request. per_event: ids in one event. error_after: events before an error of error_status.
    waits: seconds before each event. hold: no event until it is set."""

    text: str = TEXT
    per_event: int = 1
    waits: float = 0.0
    error_after: int | None = None
    error_status: int = 500
    finish: str = "stop"
    stop_id: int | None = EOS
    cached_tokens: int = 0
    hold: threading.Event | None = None


class FakeEngine:
    """The engine client's surface, as the API sees it."""

    def __init__(self, *names: str) -> None:
        self.infos = {name: ModelInfo(name, CONTEXT, VOCAB, "int8", 1000, 10 * CONTEXT, 1280, 16) for name in names or (MODEL,)}
        self.state: Any = "ready"
        self.script = Script()
        self.choose: Callable[[Generate], Script] | None = None
        self.requests: list[Generate] = []
        self.aborts: list[tuple[str, int | None, bool]] = []
        self.ended: list[Event] = []
        self.refusal: BraidError | None = None
        self.on_delivery: list[Callable[[Delivery], None]] = []
        self._aborted: dict[str, dict[int, str]] = {}
        self._streams: dict[str, Stream] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def health(self) -> Health:
        return Health(self.state, "weights" if self.state == "loading" else "", 0.25 if self.state == "loading" else 1.0)

    def models(self) -> dict[str, ModelInfo]:
        return {} if self.state == "loading" else self.infos

    def stats(self) -> dict[str, LaneStats]:
        return {name: LaneStats(name, len(self._streams), 2, 320, 0, 1280, 5, 70, 30, 70, 20, 9) for name in self.infos}

    @property
    def num_in_flight(self) -> int:
        return len(self._streams)

    def submit(self, request: Generate) -> Stream:
        if self.refusal is not None:
            raise self.refusal
        assert request.request_id not in self._streams
        request.sampling.check(VOCAB)
        self.requests.append(request)
        stream = Stream(request, self._abort)
        self._streams[request.request_id] = stream
        self._aborted[request.request_id] = {}
        task = asyncio.get_running_loop().create_task(self._run(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    def _abort(self, request_id: str, choice: int | None, finished: bool) -> None:
        self.aborts.append((request_id, choice, finished))
        stream = self._streams[request_id]
        for each in range(stream.request.num_choices) if choice is None else [choice]:
            self._aborted[request_id][each] = "stop" if finished else "abort"

    async def _run(self, stream: Stream) -> None:
        """One delivery per turn, with an event of every choice that is still open."""
        request = stream.request
        script = self.choose(request) if self.choose else self.script
        data = script.text.encode()[: request.sampling.max_tokens]
        end = script.finish if len(script.text.encode()) <= request.sampling.max_tokens else "length"
        done = [0] * request.num_choices
        try:
            for turn in itertools.count():
                await asyncio.sleep(script.waits)
                while script.hold is not None and not script.hold.is_set() and len(self._aborted[request.request_id]) < request.num_choices:
                    await asyncio.sleep(0.005)
                events = [self._event(request, script, data, end, turn, choice, done) for choice in sorted(stream.open_choices)]
                for event in events:
                    if event.finish is not None:
                        self.ended.append(event)
                    stream.push(event)
                delivery = Delivery(events, list(self.stats().values()), step_tokens=len(events))
                for callback in self.on_delivery:
                    callback(delivery)
                if stream.is_finished:
                    return
        finally:
            del self._streams[request.request_id]

    def _event(self, request: Generate, script: Script, data: bytes, end: str, turn: int, choice: int, done: list[int]) -> Event:
        usage = Usage(len(request.prompt), script.cached_tokens, done[choice], 0.001, 0.02, 0.3)
        if (aborted := self._aborted[request.request_id].get(choice)) is not None:
            return Event(request.request_id, choice, [], finish=aborted, usage=usage)
        if turn == script.error_after:
            kind = "deadline" if script.error_status == 408 else "error"
            return Event(request.request_id, choice, [], finish=kind, usage=usage, error="it broke", error_status=script.error_status)
        ids = list(data[done[choice] : done[choice] + script.per_event])
        done[choice] += len(ids)
        is_end = done[choice] >= len(data)
        logprobs = None
        if request.sampling.logprobs is not None:
            logprobs = [TokenLogprob(-0.5, [(token, -0.5), (EOS, float("-inf"))][: request.sampling.logprobs]) for token in ids]
        return Event(
            request.request_id,
            choice,
            ids,
            logprobs,
            end if is_end else None,
            script.stop_id if is_end and end == "stop" else None,
            Usage(len(request.prompt), script.cached_tokens, done[choice], 0.001, 0.02, 0.3) if is_end else None,
        )


@dataclass
class Running:
    """A server on a port of its own, in a thread of its own."""

    url: str
    port: int
    engine: FakeEngine
    codec: ByteCodec
    app: FastAPI
    server: Server

    def post(self, path: str, **body: object) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=10)

    def chat(self, content: str = "hi", **more: object) -> httpx.Response:
        return self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **more)

    def is_idle(self) -> bool:
        return not self.engine._streams and not self.engine._tasks


@contextlib.contextmanager
def running(*, limits: Limits | None = None, connection: type | None = None, **options: Any) -> Iterator[Running]:
    engine = FakeEngine()
    codec = ByteCodec()
    metrics = Metrics("braid", [MODEL])
    metrics.watch_engine(stats=engine.stats, models=engine.models, is_ready=lambda: engine.state == "ready", has_prefix_cache=True)
    engine.on_delivery.append(metrics.on_delivery)
    app = build_app(engine=engine, codecs={MODEL: codec}, metrics=metrics, limits=limits, **options)  # type: ignore[arg-type, dict-item]
    server = make_server(app)
    if connection is not None:
        server.config.http = connection
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.005)
        yield Running(f"http://127.0.0.1:{port}", port, engine, codec, app, server)
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()
        assert not thread.is_alive()
