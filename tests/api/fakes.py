"""Stand-ins for the API's tests: an engine that plays a script into real streams, and a codec whose tokens are bytes.

Long, because one engine and one codec stand in for all that the routes ask of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI

from service.__main__ import listen
from service.api.app import Limits, build_app
from service.api.layers import make_layers
from service.api.server import Server, make_server
from service.codec.prompt import Codec
from service.codec.reply import CallDelta, Parts
from service.codec.special import Special, SpecialTokens
from service.codec.tokenizer import Ends
from service.codec.tools import ToolSet
from service.engine.client import Health
from service.engine.messages import Delivery, Event, Generate, LaneStats, ModelInfo, Reading, TokenLogprob, Usage, Vocabulary
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
    special = SpecialTokens([Special(EOS, "<|end|>"), Special(OTHER_STOP, "<|other|>")])
    ends = Ends(eos_ids=(EOS,))

    def token_bytes(self, token: int, *, skip_special: bool = True) -> bytes:
        spelled = {special.id: text.encode() for text, special in self.special.by_text.items()}
        if token in spelled:
            return b"" if skip_special else spelled[token]
        return bytes([token])

    @property
    def pieces(self) -> list[bytes]:
        return [self.token_bytes(token, skip_special=False) for token in range(self.vocab_size)]

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return b"".join(self.token_bytes(token, skip_special=skip_special) for token in ids).decode("utf-8", "replace")


class InfillTokenizer(ByteTokenizer):
    """Of a model that was taught to fill in the middle."""

    vocab_size = VOCAB + 3
    special = SpecialTokens([Special(VOCAB + place, f"<|fim_{name}|>") for place, name in enumerate(("prefix", "suffix", "middle"))])


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class TagParser:
    """Reads <think>...</think> and <tool_call>{"name": "f", "arguments": {...}}</tool_call>, or "input": "..." of a custom tool."""

    def __init__(self, tools: ToolSet | None, is_reasoning: bool) -> None:
        self.has_calls = self.is_complete = self.is_cut = False
        self._tools = tools
        self._state = "think" if is_reasoning else "text"
        self._text = ""
        self._parts = Parts()
        self._index = -1
        self._kind: Any = "function"

    def push(self, text: str) -> Parts:
        self._text, self._parts = self._text + text, Parts()
        steps = {"text": self._outside, "think": self._think, "head": self._head, "call": self._call}
        while not self.is_complete and steps[self._state]():
            pass
        return self._parts

    def finish(self) -> Parts:
        self._parts = Parts()
        self.is_cut = self._state == "call"
        if self._state == "think":
            self._parts.reasoning = self._text
        elif self._state == "head":
            self._parts.text = f"<tool_call>{self._text}"
        elif self._state == "text" and not self.is_complete:
            self._parts.text = self._text
        elif self._state == "call":
            self._parts.calls = [CallDelta(self._index, arguments=self._text, kind=self._kind)]
        return self._parts

    def _until(self, *tags: str) -> tuple[str, str]:
        """What is certain to come before any of the tags, and the tag if it is there."""
        for at in range(len(self._text)):
            rest = self._text[at:]
            if found := next((tag for tag in tags if rest.startswith(tag)), ""):
                before, self._text = self._text[:at], rest[len(found) :]
                return before, found
            if any(tag.startswith(rest) for tag in tags):
                before, self._text = self._text[:at], rest
                return before, ""
        before, self._text = self._text, ""
        return before, ""

    def _think(self) -> bool:
        before, tag = self._until("</think>")
        self._parts.reasoning += before
        self._state = "text" if tag else "think"
        return bool(tag)

    def _outside(self) -> bool:
        tags = ["<think>", *(["<tool_call>"] if self._tools else [])]
        before, tag = self._until(*tags)
        self._parts.text += before
        self._state = {"<think>": "think", "<tool_call>": "head", "": "text"}[tag]
        return bool(tag)

    def _head(self) -> bool:
        found = re.match(r'\{"name": "(\w+)", ("arguments": |"input": ")', self._text)
        if found is None:
            return False
        self._text = self._text[found.end() :]
        self._index += 1
        self.has_calls, self._state = True, "call"
        self._kind = "function" if "arguments" in found[2] else "custom"
        self._add(CallDelta(self._index, f"call_{self._index}", found[1], "", self._kind))
        return True

    def _call(self) -> bool:
        before, tag = self._until("}</tool_call>" if self._kind == "function" else '"}</tool_call>')
        self._add(CallDelta(self._index, arguments=before, kind=self._kind))
        if tag:
            self._state = "text"
            self.is_complete = self._tools is not None and not self._tools.is_parallel
        return bool(tag)

    def _add(self, delta: CallDelta) -> None:
        if delta.name or delta.arguments:
            self._parts.calls = [*self._parts.calls, delta]


class TagFormat:
    """The fake model's way to answer. A prompt whose last line ends with <think> has opened its reasoning."""

    def is_reasoning(self, prompt: Sequence[int]) -> bool:
        return bytes(token for token in prompt if token < EOS).endswith(b"<think>\n")

    def is_plain(self, tools: ToolSet | None) -> bool:
        return False

    def shown(self, tools: ToolSet | None) -> frozenset[int]:
        return frozenset()

    def parser(self, tools: ToolSet | None, *, is_reasoning: bool = False) -> TagParser:
        return TagParser(tools, is_reasoning)

    def grammar(self, tools: ToolSet, *, is_reasoning: bool = False, text: str = "") -> str:
        if tools.mode == "auto" and not any(tool.is_strict for tool in tools.tools):
            return f"start: {text}\n" if text else ""
        return f"start: CALL_OF {' '.join(tools.allowed)} {text}\n"

    def after_reasoning(self, rule: str, *, is_reasoning: bool = False) -> str:
        return f"start: {rule}\n"


@dataclass
class ByteCodec:
    name: str = MODEL
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)
    template: None = None
    sampling_defaults: dict[str, float | int] = field(default_factory=lambda: {"temperature": 0.6, "top_k": 40})
    max_context: int = CONTEXT
    eos_ids: tuple[int, ...] = (EOS,)
    vocab_size: int = VOCAB
    pictures: None = None
    encode_thread: str = ""
    asked: dict[str, Any] = field(default_factory=dict)
    format: TagFormat = field(default_factory=TagFormat)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **others: Any) -> list[int]:
        self.encode_thread = threading.current_thread().name
        self.asked = {"messages": messages, **others}
        if any(message.get("content") == "refuse me" for message in messages):
            raise RequestError("the template refuses", param="messages")
        text = "".join(f"{message['role']}:{_text_of(message)}\n" for message in messages)
        return list(text.removesuffix("\n" if others.get("continue_final_message") else "").encode())

    def encode_text(self, prompt: str) -> list[int]:
        self.encode_thread = threading.current_thread().name
        return list(prompt.encode())

    def encode_document(self, text: str) -> list[int]:
        return list(text.encode())

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
    error_param: str | None = None
    error_code: str | None = None
    finish: str = "stop"
    stop_id: int | None = EOS
    cached_tokens: int = 0
    hold: threading.Event | None = None
    logprob: float = -0.5


class FakeEngine:
    """The engine client's surface, as the API sees it."""

    def __init__(self, *names: str) -> None:
        self.infos = {
            name: ModelInfo(name, CONTEXT, VOCAB, "int8", 1000, 10 * CONTEXT, 1280, 16, vector_width=4) for name in names or (MODEL,)
        }
        self.state: Any = "ready"
        self.script = Script()
        self.choose: Callable[[Generate], Script] | None = None
        self.requests: list[Generate] = []
        self.aborts: list[tuple[str, int | None, bool]] = []
        self.ended: list[Event] = []
        self.refusal: BraidError | None = None
        self.on_delivery: list[Callable[[Delivery], None]] = []
        self.max_tokens_in_flight = 100 * CONTEXT
        self.taught: dict[str, Vocabulary] = {}
        self._aborted: dict[str, dict[int, str]] = {}
        self._streams: dict[str, Stream] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def health(self) -> Health:
        return Health(self.state, "weights" if self.state == "loading" else "", 0.25 if self.state == "loading" else 1.0)

    def models(self) -> dict[str, ModelInfo]:
        return {} if self.state == "loading" else self.infos

    def stats(self) -> dict[str, LaneStats]:
        drafts = {"lookup": (12, 7), "model": (8, 3)}
        return {name: LaneStats(name, len(self._streams), 2, 320, 0, 1280, 5, 70, 30, 70, 20, 9, drafts, 6, 2, 1) for name in self.infos}

    @property
    def num_in_flight(self) -> int:
        return len(self._streams)

    def submit(self, request: Generate) -> Stream:
        if self.refusal is not None:
            raise self.refusal
        assert request.request_id not in self._streams
        request.sampling.check(self.infos[request.model].vocab_size, least_tokens=1 if request.read is None else 0)
        if request.read is not None:
            request.read.check(len(request.prompt))
        assert not request.grammar or request.model in self.taught
        self.requests.append(request)
        stream = Stream(request, self._abort)
        self._streams[request.request_id] = stream
        self._aborted[request.request_id] = {}
        task = asyncio.get_running_loop().create_task(self._run(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    def teach(self, model: str, vocabulary: Callable[[], Vocabulary]) -> None:
        if model not in self.taught:
            self.taught[model] = vocabulary()

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
            status, param, code = script.error_status, script.error_param, script.error_code
            return Event(
                request.request_id,
                choice,
                [],
                finish=kind,
                usage=usage,
                error="it broke",
                error_status=status,
                error_param=param,
                error_code=code,
            )
        ids = list(data[done[choice] : done[choice] + script.per_event])
        done[choice] += len(ids)
        is_end = done[choice] >= len(data)
        logprobs = None
        if request.sampling.logprobs is not None:
            beside, num_top = (EOS, float("-inf")), request.sampling.logprobs
            logprobs = [TokenLogprob(script.logprob, [(token, script.logprob), beside][:num_top]) for token in ids]
        return Event(
            request.request_id,
            choice,
            ids,
            logprobs,
            end if is_end else None,
            script.stop_id if is_end and end == "stop" else None,
            Usage(len(request.prompt), script.cached_tokens, done[choice], 0.001, 0.02, 0.3) if is_end else None,
            reading=reading_of(request) if turn == 0 and choice == 0 else None,
        )


def reading_of(request: Generate) -> Reading | None:
    """What the fake reads of a prompt: each id less likely than the one before, and ids from EOS down beside it; `vector_of`."""
    read = request.read
    if read is None:
        return None
    beside = [(EOS - place, -2.0 - place) for place in range(20)]
    first = read.first or len(request.prompt)
    logprobs = [
        TokenLogprob(-0.25 * place, [(token, -0.25 * place), *beside][: read.num_top])
        for place, token in enumerate(request.prompt[first:], first)
    ]
    return Reading(logprobs, struct.pack("<4f", *vector_of(request.prompt)) if read.pool else None)


def vector_of(prompt: Sequence[int]) -> list[int]:
    """How many of the ids leave 0, 1, 2 and 3 when divided by four."""
    return [sum(token % 4 == rest for token in prompt) for rest in range(4)]


@dataclass
class Running:
    """A server on a port of its own, in a thread of its own."""

    url: str
    port: int
    engine: FakeEngine
    codec: ByteCodec
    app: FastAPI
    server: Server
    # One for all requests: making a client takes longer than most requests do.
    http: httpx.Client = field(default_factory=lambda: httpx.Client(verify=False, trust_env=False, timeout=10))

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.http.post(f"{self.url}{path}", json=body)

    def chat(self, content: str = "hi", **more: object) -> httpx.Response:
        return self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **more)

    def is_idle(self) -> bool:
        return not self.engine._streams and not self.engine._tasks


@contextlib.contextmanager
def running(*, limits: Limits | None = None, connection: type | None = None, desk: Any = None, **options: Any) -> Iterator[Running]:
    """options: of `make_layers`."""
    engine = FakeEngine()
    codec = ByteCodec()
    metrics = Metrics("braid", [MODEL])
    metrics.watch_engine(stats=engine.stats, models=engine.models, is_ready=lambda: engine.state == "ready", has_prefix_cache=True)
    engine.on_delivery.append(metrics.on_delivery)
    layers = make_layers(metrics, **options)
    app = build_app(engine=engine, codecs={MODEL: codec}, metrics=metrics, limits=limits, layers=layers, desk=desk)  # type: ignore[arg-type, dict-item]
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
        found = Running(f"http://127.0.0.1:{port}", port, engine, codec, app, server)
        with found.http:
            yield found
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()
        assert not thread.is_alive()
