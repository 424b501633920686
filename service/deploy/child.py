"""A Braid server as a process of its own on this machine's loopback address: started, looked after, ended.

Knows the server by its command line, its probes and its metrics alone. Called by `replica`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from service.errors import StartupError

_POLL_S = 0.05
_END_S = 10.0


class Child:
    """A server that takes requests. arguments: of `braid serve`, without host and port. label: shown in the list of processes. start_s: how
    long it may take to be ready. Raises: StartupError where it ends or is not ready by then."""

    def __init__(self, arguments: Sequence[str], label: str, start_s: float, command: Sequence[str] = ()) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        run = [*(command or (sys.executable, "-m", "service.deploy.tether")), label, "--"]
        self._process = subprocess.Popen(
            [*run, *arguments, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            self._wait_until_ready(start_s)
        except BaseException:
            self.end()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def on_end(self, tell: Callable[[], None]) -> None:
        """Calls `tell` in a thread of its own when the server has ended."""

        def watch() -> None:
            self._process.wait()
            tell()

        threading.Thread(target=watch, name="child-watch", daemon=True).start()

    def end(self) -> None:
        """Lets it finish for some seconds, then ends it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait_until_ready(self, start_s: float) -> None:
        deadline = time.monotonic() + start_s
        with httpx.Client(timeout=2.0, trust_env=False) as client:
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    raise StartupError(f"the replica's server ended with status {self._process.returncode}; its log says why")
                try:
                    if client.get(f"{self.url}/ready").status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
                time.sleep(_POLL_S)
        raise StartupError(f"the replica's server was not ready within {start_s:g} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of the server. name: as a plain word, without a colon."""

    name: str
    text: str
    labels: dict[str, str]
    value: float


def read_figures(page: str) -> Iterator[Figure]:
    """What /metrics told, without the buckets of histograms, which would be most of it."""
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if not sample.name.endswith(("_bucket", "_created")):
                yield Figure(sample.name.replace(":", "_"), family.documentation, dict(sample.labels), sample.value)


@dataclass(frozen=True, slots=True)
class Use:
    """Of all models of a server: sequences that are computed and that wait, and the largest share of K/V in use, 0 to 1."""

    running: float = 0.0
    waiting: float = 0.0
    kv: float = 0.0


def use_of(figures: Sequence[Figure]) -> Use:
    def found(ending: str) -> list[float]:
        return [figure.value for figure in figures if figure.name.endswith(ending)]

    return Use(sum(found("_num_requests_running")), sum(found("_num_requests_waiting")), max(found("_kv_cache_usage_perc"), default=0.0))
