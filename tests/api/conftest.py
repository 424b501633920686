"""One server for all tests of this folder, with its engine's script put back before each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import openai
import pytest

from tests.api.fakes import FakeEngine, Running, Script, running


@pytest.fixture(scope="session")
def shared() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    """Fresh as far as a test can see; afterwards nothing may be left running in it."""
    engine: FakeEngine = shared.engine
    engine.script = Script()
    engine.choose = None
    engine.state = "ready"
    engine.refusal = None
    for seen in (engine.requests, engine.aborts, engine.ended):
        seen.clear()
    yield shared
    eventually(shared.is_idle)


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def eventually(check: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "did not come true in time"
        time.sleep(0.005)
