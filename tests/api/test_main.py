"""The server's life as a process: start, readiness, signals, draining, and the engine's death."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from service.__main__ import _check_tokens, listen
from service.catalog import Resolved
from service.codec.prompt import load_codec
from service.errors import StartupError
from tests.api.conftest import eventually
from tests.codec.tiny import byte_level_metadata, write_gguf

ROOT = Path(__file__).parents[2]
HI = [{"role": "user", "content": "hi"}]


class Process:
    """A server of its own, and the streams that were opened on it."""

    def __init__(self, drain_s: float, *worker: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "tests.api.root", str(self.port), str(drain_s), *worker]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.answers: list[str] = []
        self.readers: list[threading.Thread] = []

    def status(self, path: str) -> int:
        try:
            return httpx.get(f"{self.url}{path}", timeout=2).status_code
        except httpx.TransportError:
            return 0

    def wait_ready(self) -> None:
        eventually(lambda: self.status("/ready") == 200, 20)

    def stream(self, max_tokens: int) -> None:
        """Reads a stream in a thread; what came is in `answers` when it has ended."""

        def read() -> None:
            body = {"messages": HI, "max_tokens": max_tokens, "stream": True}
            with contextlib.suppress(httpx.TransportError), httpx.Client(timeout=30) as client:
                self.answers.append(client.post(f"{self.url}/v1/chat/completions", json=body).text)

        reader = threading.Thread(target=read)
        reader.start()
        self.readers.append(reader)

    def engine(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def end(self, seconds: float) -> tuple[int, str]:
        """(exit status, what it wrote) within that time; no engine may outlive it."""
        for reader in self.readers:
            reader.join(20)
        _, written = self.process.communicate(timeout=seconds)
        return self.process.returncode, written


@pytest.fixture
def start() -> Iterator[object]:
    started: list[Process] = []

    def begin(drain_s: float, *worker: str) -> Process:
        started.append(Process(drain_s, *worker))
        return started[-1]

    yield begin
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


def test_drains_and_ends_well(start) -> None:  # type: ignore[no-untyped-def]
    server = start(20, "--step-s", "0.02")
    server.wait_ready()
    for _ in range(3):
        server.stream(60)
    running = 'braid:num_requests_running{engine="0",model_name="tiny"} 3.0'
    eventually(lambda: running in httpx.get(f"{server.url}/metrics").text)
    child = server.engine()
    server.process.terminate()
    eventually(lambda: server.status("/ready") == 503, 1)
    assert server.status("/live") == 200
    refused = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HI})
    assert (refused.status_code, refused.headers["connection"]) == (503, "close")
    status, written = server.end(10)
    assert status == 0, written
    assert len(server.answers) == 3
    assert all(answer.endswith("data: [DONE]\n\n") for answer in server.answers)
    assert not child.is_running()


def test_what_does_not_finish_in_time_is_told(start) -> None:  # type: ignore[no-untyped-def]
    server = start(0.3, "--step-s", "0.05")
    server.wait_ready()
    server.stream(400)
    eventually(lambda: 'braid:num_requests_running{engine="0",model_name="tiny"} 1.0' in httpx.get(f"{server.url}/metrics").text)
    begin = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    status, written = server.end(10)
    assert status == 0, written
    assert time.monotonic() - begin < 5
    last = json.loads(server.answers[0].rstrip().rpartition("data: ")[2])
    assert last["error"]["type"] == "service_unavailable_error"


def test_a_dead_engine_ends_the_server(start) -> None:  # type: ignore[no-untyped-def]
    server = start(20, "--step-s", "0.05")
    server.wait_ready()
    server.stream(400)
    eventually(lambda: 'braid:num_requests_running{engine="0",model_name="tiny"} 1.0' in httpx.get(f"{server.url}/metrics").text)
    server.engine().kill()
    eventually(lambda: server.status("/health") == 503, 2)
    status, written = server.end(10)
    assert status == 1
    assert "the engine is dead" in written
    last = json.loads(server.answers[0].rstrip().rpartition("data: ")[2])
    assert last["error"]["type"] == "server_error"


def test_a_second_signal_ends_at_once(start) -> None:  # type: ignore[no-untyped-def]
    server = start(60, "--step-s", "0.05")
    server.wait_ready()
    server.stream(400)
    eventually(lambda: 'braid:num_requests_running{engine="0",model_name="tiny"} 1.0' in httpx.get(f"{server.url}/metrics").text)
    child = server.engine()
    server.process.terminate()
    eventually(lambda: server.status("/ready") == 503, 1)
    server.process.terminate()
    assert server.end(3)[0] == 128 + signal.SIGTERM
    eventually(lambda: not child.is_running())


def test_a_signal_while_loading(start) -> None:  # type: ignore[no-untyped-def]
    server = start(60, "--start", "hang")
    eventually(lambda: server.status("/live") == 200, 10)
    eventually(lambda: httpx.get(f"{server.url}/ready").json() == {"status": "loading", "detail": "weights", "progress": 0.25}, 10)
    server.process.terminate()
    status, written = server.end(5)
    assert status == 0, written


def test_probes_answer_while_the_app_is_being_built_and_requests_wait(start) -> None:  # type: ignore[no-untyped-def]
    server = start(5, "--codec-s", "1.5")
    eventually(lambda: server.status("/live") == 200, 10)
    begin = time.monotonic()
    assert server.status("/ready") == 503
    assert httpx.get(f"{server.url}/v1/models", timeout=10).json()["data"][0]["id"] == "tiny"
    assert time.monotonic() - begin > 0.5
    server.process.terminate()
    assert server.end(10)[0] == 0


def test_an_engine_that_can_not_start(start) -> None:  # type: ignore[no-untyped-def]
    status, written = start(60, "--start", "refuse").end(20)
    assert status == 1
    assert "the weights are not what they say" in written


def test_an_address_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(StartupError, match="Address already in use; another"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(StartupError, match="can't listen on"):
        listen("no.such.host.invalid", 1)


def test_the_http_process_never_loads_torch() -> None:
    modules = "service.__main__, service.api.app, service.codec.prompt"
    code = f"import sys, {modules}; print(sorted({{'torch', 'transformers', 'triton'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ})
    assert result.stdout.strip() == "[]"


def test_answers_on_a_kept_connection_wait_for_no_acknowledgement(start) -> None:  # type: ignore[no-untyped-def]
    server = start(1)
    server.wait_ready()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    seconds = []
    for _ in range(20):
        began = time.monotonic()
        connection.request("GET", "/live")
        assert connection.getresponse().read() == b'{"status":"ok"}'
        seconds.append(time.monotonic() - began)
    connection.close()
    # Under a millisecond; with Nagle's algorithm the delayed acknowledgement's 40 ms, every time but the first few.
    assert statistics.median(seconds) < 0.03


def test_a_draft_model_must_have_the_same_tokens(tmp_path: Path) -> None:
    metadata = byte_level_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    model = write_gguf(tmp_path / "model.gguf", metadata)
    other = write_gguf(tmp_path / "other.gguf", {**metadata, "tokenizer.ggml.tokens": [*tokens[:3], "<other>", *tokens[4:]]})
    codec = load_codec(model, name="model")
    _check_tokens("model", codec, Resolved("same", model, "", 1))
    with pytest.raises(StartupError, match="other and model do not have the same tokens \\(id 3 is the first that differs\\)"):
        _check_tokens("model", codec, Resolved("other", other, "", 1))
