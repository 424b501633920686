"""The application on a real Ray cluster: two nodes on this machine, a replica each, and one of them killed while it works.

Long, and skipped where ray is not installed: `pip install braid[ray]`; `make test-long` does so.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray", reason="ray is not installed: pip install braid[ray]")
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # ray's own
]

SERVE = ("braid-nano", "--memory", "256MiB", "--data-dir", "off", "--threads", "1", "--log-level", "warning")
NUM_STREAMS = 16
MAX_TOKENS = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(is_true: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := is_true()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.2)
    return found


def servers() -> dict[str, psutil.Process]:
    """The server of each replica on this machine that was started beneath this process or by its cluster, by the replica's name."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "service.deploy.tether" in line and f"--memory{SERVE[2]}" == line[line.index("--memory")] + line[line.index("--memory") + 1]:
            name = next(word.partition("=")[2] for word in line if word.startswith("--replica="))
            found[name] = process
    return found


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    from service.deploy import cluster
    from service.deploy.plan import Plan

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 2**20})
    port = free_port()
    try:
        nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        cluster.connect(nodes.address)
        cluster.start(Plan(SERVE, low=2, high=2, port=port))
        yield f"http://127.0.0.1:{port}"
    finally:
        cluster.stop()
        nodes.shutdown()
        until(lambda: not servers())


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


@dataclass
class Stream:
    """A streamed chat, read in a thread of its own."""

    url: str
    text: str
    replica: str = ""
    events: list[str] = field(default_factory=list)
    has_begun: threading.Event = field(default_factory=threading.Event)

    def read(self) -> Stream:
        asked = body(self.text, stream=True, max_tokens=MAX_TOKENS, ignore_eos=True)
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=asked, timeout=120) as answer:
            answer.raise_for_status()
            self.replica = answer.headers["x-braid-replica"]
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line.removeprefix("data: "))
                    self.has_begun.set()
        return self


def test_both_nodes_have_a_replica(url: str) -> None:
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    assert len(alive) == 2
    assert len(until(lambda: servers() if len(servers()) == 2 else None)) == 2
    for name in servers():
        answer = httpx.get(f"{url}/ready", headers={"x-braid-replica": name})
        assert (answer.status_code, answer.headers["x-braid-replica"]) == (200, name)


def test_the_whole_api_is_behind_it(url: str) -> None:
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "braid-nano"
    wrong = httpx.post(f"{url}/v1/chat/completions", json={"messages": 5})
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (400, "invalid_request_error")
    assert httpx.post(f"{url}/v1/messages", json={}).json()["type"] == "error"
    nowhere = httpx.get(f"{url}/v1/models", headers={"x-braid-replica": "nobody"})
    assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, "not_found")


def test_prompts_that_begin_alike_meet_the_same_replica(url: str) -> None:
    homes = []
    for subject in range(8):
        prefix = f"Subject {subject}. " + "Words that all of its questions begin with. " * 8
        answers = [httpx.post(f"{url}/v1/chat/completions", json=body(f"{prefix}{n}", max_tokens=1), timeout=60) for n in range(4)]
        names = {answer.headers["x-braid-replica"] for answer in answers}
        assert len(names) == 1
        homes += names
        cached = [answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
        assert min(cached[1:]) > 0
    assert len(set(homes)) == 2


def test_a_stored_response_is_found_where_it_is(url: str) -> None:
    made = [httpx.post(f"{url}/v1/responses", json={"input": f"Hello {n}", "max_output_tokens": 4}, timeout=60).json() for n in range(6)]
    for response in made:
        assert httpx.get(f"{url}/v1/responses/{response['id']}").json()["id"] == response["id"]


def test_a_client_that_leaves_ends_its_request(url: str) -> None:
    def running(name: str) -> float:
        page = httpx.get(f"{url}/metrics", headers={"x-braid-replica": name}).text
        return float(next(line for line in page.splitlines() if line.startswith("braid:num_requests_running{")).split()[-1])

    asked = body("Once upon a time", stream=True, max_tokens=MAX_TOKENS, ignore_eos=True)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=60) as answer:
        name = answer.headers["x-braid-replica"]
        lines = answer.iter_lines()
        for _ in range(6):
            next(lines)
    until(lambda: not running(name), 20)
    page = httpx.get(f"{url}/metrics", headers={"x-braid-replica": name}).text
    aborted = [line for line in page.splitlines() if line.startswith("braid:request_success_total{") and '"abort"' in line]
    assert sum(float(line.split()[-1]) for line in aborted) == 1


def kill_amid_load(url: str, kill: Callable[[psutil.Process], None]) -> tuple[str, list[Stream], list[int]]:
    """Streams on both replicas and whole answers beside them; one replica is killed as soon as all streams have begun."""
    before = until(lambda: servers() if len(servers()) == 2 else None)
    statuses: list[int] = []
    is_over = threading.Event()

    def ask_on() -> None:
        number = 0
        while not is_over.is_set():
            number += 1
            answer = httpx.post(f"{url}/v1/chat/completions", json=body(f"Whole answer {number}", max_tokens=8), timeout=120)
            statuses.append(answer.status_code)

    streams = [Stream(url, f"Stream {number}. " + f"What only {number} says. " * 16) for number in range(NUM_STREAMS)]
    with ThreadPoolExecutor(NUM_STREAMS + 1) as pool:
        asking = pool.submit(ask_on)
        try:
            reading = [pool.submit(stream.read) for stream in streams]
            until(lambda: all(stream.has_begun.is_set() for stream in streams) or any(task.done() for task in reading), 60)
            open_on = [stream.replica for stream, task in zip(streams, reading, strict=True) if not task.done()]
            victim = max(before, key=open_on.count)
            kill(before[victim])
            for task in reading:
                task.result(120)
            until(lambda: len(servers()) == 2 and victim not in servers())
        finally:
            is_over.set()
        asking.result(120)
    return victim, streams, statuses


def check_losses(victim: str, streams: list[Stream], statuses: list[int]) -> None:
    lost = [stream for stream in streams if stream.events[-1] != "[DONE]"]
    assert lost, "nothing was under way when the replica was killed"
    assert {stream.replica for stream in lost} == {victim}
    for stream in lost:
        assert json.loads(stream.events[-1])["error"]["code"] == "server_is_overloaded"
    others = [stream for stream in streams if stream.replica != victim]
    assert others
    assert all(stream.events[-1] == "[DONE]" for stream in others)
    assert statuses
    assert set(statuses) == {200}


def check_replacement(url: str, victim: str) -> None:
    assert victim not in servers()
    for name in servers():

        def answers(name: str = name) -> bool:
            """The gate is told of a new replica a moment after it is ready."""
            answer = httpx.post(
                f"{url}/v1/chat/completions", json=body("Hello", max_tokens=2), headers={"x-braid-replica": name}, timeout=60
            )
            return answer.status_code == 200

        until(answers)


def kill_replica(server: psutil.Process) -> None:
    """The process of Ray's actor; its server must not outlive it."""
    server.parent().kill()


def kill_server(server: psutil.Process) -> None:
    server.kill()


@pytest.mark.parametrize("kill", [kill_replica, kill_server])
def test_a_replica_that_is_killed_takes_its_own_streams_and_nothing_else(url: str, kill: Callable[[psutil.Process], None]) -> None:
    victim, streams, statuses = kill_amid_load(url, kill)
    check_losses(victim, streams, statuses)
    check_replacement(url, victim)


def test_the_command_scales_with_the_load_and_ends_on_a_signal() -> None:
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "service.cli",
        "deploy",
        "--model",
        SERVE[0],
        "--replicas",
        "1:2",
        "--goal-requests",
        "2",
        "--cpus",
        "0.5",
    ]
    command += ["--port", str(port), "--address", "local", "--", *(each for each in SERVE[1:] if each not in ("--data-dir", "off"))]
    before = set(servers())
    with subprocess.Popen(command) as process:
        try:
            until(lambda: process.poll() is not None or _is_ready(f"http://127.0.0.1:{port}"))
            assert process.poll() is None
            assert len(set(servers()) - before) == 1
            is_over = threading.Event()

            def ask_on(number: int) -> None:
                while not is_over.is_set():
                    Stream(f"http://127.0.0.1:{port}", f"{number}").read()

            with ThreadPoolExecutor(NUM_STREAMS) as pool:
                asking = [pool.submit(ask_on, number) for number in range(NUM_STREAMS)]
                try:
                    until(lambda: len(set(servers()) - before) == 2)
                finally:
                    is_over.set()
                for task in asking:
                    task.result(120)
        finally:
            process.send_signal(signal.SIGINT)
            status = process.wait(120)
    assert status == 0
    until(lambda: set(servers()) <= before, 30)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
