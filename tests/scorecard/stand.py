"""What the scorecard runs against: the real server as a process, with a tiny model of random weights whose tokens are mostly bytes.

Nothing is faked: codec, template, engine, scheduler and kernels are what a user gets; only the model has nothing to say.
"""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from service.model.config import LayerAttention
from tests.codec.tiny import byte_level_metadata, write_gguf
from tests.model.checkpoints import TINY, gguf_name, interleave, metadata_of, random_tensors

CONTEXT = 2048
MAX_BODY = 4 * 2**20
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
NUM_TOKENS = len(byte_level_metadata()["tokenizer.ggml.tokens"])
# The logits are wider than the vocabulary, as in many real models.
WIDTH = NUM_TOKENS + 6
CANARY = {"prompt": "hello canary", "max_tokens": 12, "temperature": 0}
MODEL = "scorecard"


def write_model(folder: Path) -> Path:
    config = replace(TINY, vocab_size=WIDTH, layers=(LayerAttention(),) * 2, max_context=CONTEXT)
    tensors = random_tensors(config, seed=5)
    stored: dict[str, np.ndarray[Any, Any]] = {}
    for name, values in tensors.items():
        part = name.rpartition(".")[2]
        if part in ("q", "k"):
            values = interleave(values, config.num_heads if part == "q" else config.num_kv_heads)
        stored[gguf_name(name)] = (values * (0.25 if "norm" not in name else 1)).astype(np.float32)
    metadata = {**metadata_of(config, "llama"), **byte_level_metadata(**{"llama.context_length": CONTEXT})}
    return write_gguf(folder / f"{MODEL}.gguf", metadata, stored)


@dataclass
class Stand:
    """A running server and what was true of it when it was fresh."""

    url: str
    port: int
    process: psutil.Process
    headers: dict[str, str] = field(default_factory=dict)
    canary: str = ""
    rss_bytes: int = 0
    fresh_bytes: int = 0
    num_files: int = 0
    seen: list[str] = field(default_factory=list)
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=1)))

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Remembers the texts of errors, for the case that looks at all of them."""
        answer = self.client.request(method, self.url + path, headers={**self.headers, **more.pop("headers", {})}, **more)
        if answer.status_code >= 400:
            self.seen.append(answer.text)
        return answer

    def complete(self, prompt: Any = "hi", **more: Any) -> httpx.Response:
        return self.post(TEXT, **{"prompt": prompt, "max_tokens": 4, **more})

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.ask("POST", path, json=body)

    def chat(self, content: Any = "hi", **more: Any) -> httpx.Response:
        return self.post(CHAT, **{"messages": [{"role": "user", "content": content}], "max_tokens": 4, **more})

    def send(self, content: bytes, path: str = CHAT, **headers: str) -> httpx.Response:
        return self.ask("POST", path, content=content, headers={"content-type": "application/json", **headers})

    def raw(self, *pieces: bytes, seconds: float = 20) -> bytes:
        """What comes back over a socket of its own until the server closes it."""
        data = b""
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as raw,
            contextlib.suppress(ConnectionResetError, BrokenPipeError),
        ):
            for piece in pieces:
                raw.sendall(piece)
            while part := raw.recv(65_536):
                data += part
        return data

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", headers=self.headers, timeout=10).text
        return sum(s.value for family in text_string_to_metric_families(text) for s in family.samples if s.name == f"braid:{name}")

    def processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def measure(self) -> tuple[int, int]:
        """(resident bytes, open files) of the server and its engine."""
        return sum(each.memory_info().rss for each in self.processes()), sum(each.num_fds() for each in self.processes())

    def say(self) -> str:
        return str(self.post(TEXT, **CANARY, logprobs=1).json()["choices"])

    def is_idle(self) -> bool:
        return all(self.metric(name) == 0 for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))

    def check_idle(self) -> None:
        """IDLE, as the scorecard defines it."""
        eventually(self.is_idle)
        assert httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        assert self.say() == self.canary
        eventually(self.is_idle)
        rss_bytes = self.measure()[0]
        assert rss_bytes < self.rss_bytes + 30 * 2**20, "one case may not leave much"
        assert rss_bytes < self.fresh_bytes + 100 * 2**20, "and all together no more than what caches are for"
        self.rss_bytes = rss_bytes
        eventually(lambda: self.measure()[1] <= self.num_files + 4)


def eventually(check: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "did not come true in time"
        time.sleep(0.02)


@contextlib.contextmanager
def standing(model: Path, *arguments: str, headers: dict[str, str] | None = None) -> Iterator[Stand]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = (
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--threads",
        "2",
        "--log-level",
        "warning",
        "--max-body",
        str(MAX_BODY),
        "--data-dir",
        str(model.parent / f"data-{port}"),
    )
    command = [sys.executable, "-m", "service.cli", "serve", str(model), *flags, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    stand = None
    try:
        stand = Stand(f"http://127.0.0.1:{port}", port, psutil.Process(process.pid), headers or {})
        eventually(functools.partial(_is_ready, stand, process), 60)
        _warm_up(stand)
        yield stand
    finally:
        if stand is not None:
            stand.client.close()
        process.terminate()
        assert process.wait(30) == 0


def _is_ready(stand: Stand, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "the server ended"
    try:
        return httpx.get(f"{stand.url}/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def _warm_up(stand: Stand) -> None:
    """What is loaded with the first request of a kind, and what a large body leaves in the allocator, is no leak."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    stand.chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}, max_tokens=20)
    stand.chat(n=4, stream=True, logprobs=True, top_logprobs=2)
    stand.send(b'{"messages":"%s"}' % (b" " * (MAX_BODY - 100)))
    stand.canary = stand.say()
    eventually(stand.is_idle)
    stand.rss_bytes, stand.num_files = stand.measure()
    stand.fresh_bytes = stand.rss_bytes


def error_of(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """E400 of the scorecard: the form is OpenAI's, the type says whose fault it is, an id is there."""
    assert answer.status_code == status, answer.text[:500]
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert answer.headers["x-request-id"]
    if status == 400:
        assert error["type"] == "invalid_request_error"
    return error


def events_of(text: str) -> list[dict[str, Any]]:
    """A stream's chunks; its last event must be [DONE] and there must be no other end."""
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert text.count("[DONE]") == 1
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2] if not event.startswith(":")]
