"""docker/healthcheck.py as Docker runs it: a process and its exit status."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from service.settings import Settings

SCRIPT = Path(__file__).parents[2] / "docker/healthcheck.py"


@contextmanager
def serving(status: int) -> Iterator[int]:
    """A server that answers every path but /health with 404, and this one with `status`. Gives its port."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()
            self.wfile.write(b'{"state": "stalled"}')

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "BRAID_PORT" and not key.lower().endswith("_proxy")}
    command = [sys.executable, "-I", "-S", str(SCRIPT), *arguments]
    return subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, timeout=20, check=False)


def test_healthy() -> None:
    with serving(200) as port:
        done = check(BRAID_PORT=str(port))
    assert (done.returncode, done.stderr) == (0, "")


def test_url_may_be_given() -> None:
    with serving(200) as port:
        assert check(f"http://127.0.0.1:{port}/health").returncode == 0
        assert check(f"http://127.0.0.1:{port}/elsewhere").returncode == 1


@pytest.mark.parametrize("status", [503, 500, 204])
def test_any_other_status_is_ill(status: int) -> None:
    with serving(status) as port:
        done = check(BRAID_PORT=str(port))
    assert done.returncode == 1
    if status >= 400:
        assert f"status {status}" in done.stderr
        assert "stalled" in done.stderr


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        done = check(BRAID_PORT=str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert done.stderr.startswith("no answer")


def test_a_silent_server_is_given_up_before_docker_gives_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = check(BRAID_PORT=str(silent.getsockname()[1]))
    assert done.returncode == 1
    assert done.stderr.startswith("no answer")


def test_goes_through_no_proxy() -> None:
    with serving(200) as port:
        assert check(BRAID_PORT=str(port), http_proxy="http://127.0.0.1:9").returncode == 0


def test_without_a_port_it_asks_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    own_url = runpy.run_path(str(SCRIPT))["own_url"]
    for value in (None, ""):
        monkeypatch.delenv("BRAID_PORT", raising=False) if value is None else monkeypatch.setenv("BRAID_PORT", value)
        assert own_url() == f"http://127.0.0.1:{Settings().port}/health"
