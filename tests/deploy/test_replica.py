"""A replica with a child that is a small server of the test's own: forwarding, figures, health, and that the child never outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from service.deploy.affinity import Affinity
from service.deploy.child import Child, Figure, Use, read_figures, use_of
from service.deploy.exchange import Forwarded, Head, Part, Taken
from service.deploy.replica import Replica
from service.errors import StartupError

SERVER = Path(__file__).with_name("child_server.py")
COMMAND = (sys.executable, str(SERVER))


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child(["one"], "--replica=r1", 20.0, COMMAND)
    yield child
    child.end()


@contextlib.asynccontextmanager
async def replica_of(child: Child, published: list[Figure] | None = None) -> AsyncIterator[Replica]:
    replica = Replica("r1", child, (published if published is not None else []).extend)
    yield replica
    await replica.close()


async def answer(child: Child, request: Forwarded) -> list[Part]:
    async with replica_of(child) as replica:
        return [part async for part in replica.forward(request)]


async def look(child: Child, published: list[Figure] | None = None) -> Use:
    async with replica_of(child, published) as replica:
        try:
            await replica.look()
        finally:
            await replica.close()
        return replica.use


def test_a_request_is_forwarded_byte_for_byte(child: Child) -> None:
    request = Forwarded("POST", "/echo%2Fa?b=%20c", ((b"x-mine", b"1"), (b"host", b"example.org")), b"\0body")
    taken, head, *body = asyncio.run(answer(child, request))
    assert taken == Taken("r1")
    assert isinstance(head, Head)
    assert head.status == 201
    assert b"transfer-encoding" not in dict(head.fields)
    told = b"".join(part for part in body if isinstance(part, bytes)).split(b"\n")
    assert told == [b"POST /echo%2Fa?b=%20c", b"1", b"example.org", b"\0body"]


def test_somebody_elses_request_is_refused(child: Child) -> None:
    _, head, body = asyncio.run(answer(child, Forwarded("GET", "/x", ((b"x-braid-replica", b"gone"),), b"")))
    assert isinstance(head, Head)
    assert isinstance(body, bytes)
    assert (head.status, b"gone" in body) == (404, True)


def test_a_replica_that_is_only_preferred_need_not_be_this_one(child: Child) -> None:
    """The one that kept something is gone: this one's server says that it knows no such thing."""
    _, head, *_ = asyncio.run(answer(child, Forwarded("GET", "/was-left", (), b"", Affinity(replica="gone"))))
    assert isinstance(head, Head)
    assert head.status == 200


def test_closing_an_answer_ends_it_in_the_server(child: Child) -> None:
    async def go() -> bool:
        async with replica_of(child) as replica:
            parts = replica.forward(Forwarded("GET", "/endless", (), b""))
            for _ in range(3):
                await anext(parts)
            await parts.aclose()  # type: ignore[attr-defined]
            for _ in range(200):
                if (await answer(child, Forwarded("GET", "/was-left", (), b"")))[-1] == b"yes":
                    return True
                await asyncio.sleep(0.05)
        return False

    assert asyncio.run(go())


def test_figures_are_published_and_health_is_told(child: Child) -> None:
    published: list[Figure] = []
    assert asyncio.run(look(child, published)) == Use(3.0, 4.0, 0.5)
    assert {figure.name for figure in published} >= {"braid_num_requests_running", "braid_time_sum", "braid_time_count"}
    assert not any("bucket" in figure.name for figure in published)


@pytest.mark.parametrize(("key", "running"), [("the-key", 3.0), ("", 0.0), ("another", 0.0)])
def test_a_server_with_keys_tells_its_figures_to_one_of_them(key: str, running: float) -> None:
    child = Child(["locked"], "--replica=r1", 20.0, COMMAND)

    async def go() -> float:
        replica = Replica("r1", child, lambda figures: None, key)
        await replica.look()
        await replica.close()
        return replica.use.running

    try:
        assert asyncio.run(go()) == running
    finally:
        child.end()


def test_a_server_that_is_gone_is_not_well(child: Child) -> None:
    ended = threading.Event()
    child.on_end(ended.set)
    psutil.Process(child.pid).kill()
    assert ended.wait(20)
    with pytest.raises(RuntimeError, match="does not answer"):
        asyncio.run(look(child))


def test_a_server_that_is_stuck_is_not_well() -> None:
    child = Child(["stuck"], "--replica=r1", 20.0, COMMAND)
    try:
        with pytest.raises(RuntimeError, match="not well"):
            asyncio.run(look(child))
    finally:
        child.end()


def test_a_server_that_ends_or_never_gets_ready_is_an_error() -> None:
    with pytest.raises(StartupError, match="status 3"):
        Child(["broken"], "--replica=r1", 20.0, COMMAND)
    with pytest.raises(StartupError, match="not ready"):
        Child(["loading"], "--replica=r1", 0.3, COMMAND)


def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """However that one ends: here by SIGKILL. The tether is the real one, what it runs is not."""
    (tmp_path / "service").mkdir()
    code = (
        "import subprocess, sys, time\n"
        "run = [sys.executable, '-c', 'import runpy, sys, time; from service.deploy import tether; '\n"
        "       'runpy.run_module = lambda *a, **k: time.sleep(600); tether.main([])']\n"
        "print(subprocess.Popen(run, stdin=subprocess.PIPE).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        tethered = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.5)
        assert tethered.is_running()
        parent.kill()
        tethered.wait(20)


def test_use_is_summed_over_models_and_the_fullest_counts() -> None:
    page = 'braid:num_requests_running{model_name="a"} 1\nbraid:num_requests_running{model_name="b"} 2\n'
    page += 'braid:kv_cache_usage_perc{model_name="a"} 0.1\nbraid:kv_cache_usage_perc{model_name="b"} 0.7\n'
    use = use_of(list(read_figures(page)))
    assert (use.running, use.kv) == (3.0, 0.7)
    assert use_of([]).kv == 0.0
