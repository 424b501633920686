"""Many prompts read for one HTTP request: order, a bounded number in flight, a full server, and an end of all when one fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from starlette.requests import ClientDisconnect, Request

from service.api import readings
from service.api.backend import Backend, Caller
from service.api.readings import PromptReadings, read_prompts, while_connected
from service.engine.messages import Generate
from service.engine.stream import Stream
from service.errors import ContextLengthError, OverloadedError, RequestError, UnavailableError
from service.metrics import Metrics
from service.scheduling.reading import Read
from tests.api.fakes import CONTEXT, MODEL, ByteCodec, FakeEngine, Script, reading_of

T = TypeVar("T")
CALLER = Caller("tenant", 0.0, priority=2)
READ = Read(first=1, num_top=2, pool="last")


class CrowdedEngine(FakeEngine):
    """Takes so many requests at a time; remembers how many and how many tokens there were at most."""

    def __init__(self, places: int = 10_000) -> None:
        super().__init__()
        self.places = places
        self.most = self.most_tokens = self.num_refusals = 0

    def submit(self, request: Generate) -> Stream:
        if self.num_in_flight >= self.places:
            self.num_refusals += 1
            raise OverloadedError("it is full", retry_after_s=1.0)
        stream = super().submit(request)
        self.most = max(self.most, self.num_in_flight)
        self.most_tokens = max(self.most_tokens, sum(len(one.request.prompt) for one in self._streams.values()))
        return stream


def backend_of(engine: FakeEngine) -> Backend:
    metrics = Metrics("braid", [MODEL])
    engine.on_delivery.append(metrics.on_delivery)
    return Backend(engine, {MODEL: ByteCodec()}, metrics, 256)  # type: ignore[arg-type, dict-item]


def value(backend: Backend, name: str, **labels: str) -> float:
    return backend._metrics.registry.get_sample_value(f"braid:{name}", labels) or 0.0


def run(engine: FakeEngine, work: Callable[[Backend], Awaitable[T]]) -> T:
    """The result; the engine must be idle soon after."""

    async def main() -> T:
        try:
            return await work(backend_of(engine))
        finally:
            async with asyncio.timeout(5):
                while engine._tasks:
                    await asyncio.sleep(0.001)

    return asyncio.run(main())


def read_all(prompts: list[list[int]], read: Any = READ, **options: Any) -> Callable[[Backend], Awaitable[PromptReadings]]:
    return lambda backend: read_prompts(backend, MODEL, prompts, read, CALLER, "embd-1", **options)


def prompts_of(count: int, length: int = 5) -> list[list[int]]:
    return [[(7 * number + at) % 256 for at in range(length)] for number in range(count)]


def test_readings_come_in_the_order_of_their_prompts() -> None:
    engine = CrowdedEngine()
    engine.script.cached_tokens = 2
    engine.choose = lambda request: Script(waits=0.001 * (int(request.request_id.rpartition("-")[2]) % 5), cached_tokens=2)
    prompts = prompts_of(40)
    reads = [Read(first=1 + number % 4, num_top=number % 3) for number in range(40)]
    found = run(engine, read_all(prompts, reads, cache_salt="salt"))
    assert found.readings == [reading_of(request) for request in sorted(engine.requests, key=lambda r: int(r.request_id[7:]))]
    assert [request.read for request in engine.requests] == reads
    assert (found.prompt_tokens, found.cached_tokens) == (200, 80)
    (wanted, *_) = engine.requests
    assert (wanted.sampling.max_tokens, wanted.priority, wanted.num_choices) == (0, 2, 1)
    assert wanted.tenant not in ("", "tenant"), "the salt was forgotten"


def test_a_bounded_number_is_in_flight() -> None:
    engine = CrowdedEngine()
    found = run(engine, read_all(prompts_of(50), concurrency=7))
    assert len(found.readings) == 50
    assert engine.most == 7


def test_a_bounded_number_of_tokens_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "MOST_TOKENS_IN_FLIGHT", 100)
    engine = CrowdedEngine()
    found = run(engine, read_all([*prompts_of(20, 30), *prompts_of(2, 150)]))
    assert len(found.readings) == 22
    assert engine.most == 3
    assert engine.most_tokens == 150, "one alone may be longer"


def test_a_full_server_refuses_at_once() -> None:
    engine = CrowdedEngine(places=0)

    async def work(backend: Backend) -> float:
        with pytest.raises(OverloadedError):
            await read_all(prompts_of(3))(backend)
        return value(backend, "admission_rejections_total", model_name=MODEL, reason="max_num_queued_tokens")

    assert run(engine, work) == 1
    assert engine.num_refusals == 1


def test_what_has_begun_waits_for_places() -> None:
    engine = CrowdedEngine(places=3)

    async def work(backend: Backend) -> float:
        found = await read_all(prompts_of(20))(backend)
        assert len(found.readings) == 20
        return value(backend, "admission_rejections_total", model_name=MODEL, reason="max_num_queued_tokens")

    assert run(engine, work) == 0, "a wait was counted as a refusal"
    assert engine.num_refusals > 0


def test_it_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "PATIENCE_S", 0.1)
    engine = CrowdedEngine(places=1)

    def others_come(request: Generate) -> Script:
        engine.places = 0
        return Script()

    engine.choose = others_come
    with pytest.raises(OverloadedError):
        run(engine, read_all(prompts_of(2)))


def test_one_failure_ends_all() -> None:
    engine = CrowdedEngine()

    def choose(request: Generate) -> Script:
        if request.request_id == "embd-1-4":
            return Script(error_after=0, error_status=400, error_param="input", waits=0.01)
        return Script(waits=0.05)

    engine.choose = choose
    with pytest.raises(RequestError, match="it broke") as caught:
        run(engine, read_all(prompts_of(30), concurrency=10))
    assert caught.value.param == "input"
    assert len(engine.requests) == 10, "more was sent after the failure"
    assert {request_id for request_id, _, _ in engine.aborts} == {f"embd-1-{number}" for number in range(10)} - {"embd-1-4"}


def test_an_abort_from_elsewhere_is_an_error() -> None:
    engine = CrowdedEngine()
    engine.script.waits = 0.01

    async def work(backend: Backend) -> None:
        reading = asyncio.create_task(read_prompts(backend, MODEL, prompts_of(1), READ, CALLER, "embd-1"))
        await asyncio.sleep(0.001)
        engine._abort("embd-1-0", None, False)
        with pytest.raises(UnavailableError):
            await reading

    run(engine, work)


def request_of(messages: list[dict[str, Any]], wait: asyncio.Event) -> Request:
    async def receive() -> dict[str, Any]:
        if not messages:
            await wait.wait()
            return {"type": "http.disconnect"}
        return messages.pop(0)

    return Request({"type": "http", "headers": []}, receive)


def test_a_client_that_goes_away_aborts_all() -> None:
    engine = CrowdedEngine()
    engine.script.waits = 60.0

    async def work(backend: Backend) -> None:
        gone = asyncio.Event()
        asyncio.get_running_loop().call_later(0.02, gone.set)
        with pytest.raises(ClientDisconnect):
            await while_connected(request_of([], gone), read_prompts(backend, MODEL, prompts_of(9), READ, CALLER, "embd-1"))
        assert len(engine.aborts) == 9
        for task in engine._tasks:
            task.cancel()

    run(engine, work)


def test_a_client_that_stays_gets_the_result_or_the_error() -> None:
    async def work(backend: Backend) -> None:
        request = request_of([{"type": "http.request"}], asyncio.Event())
        found = await while_connected(request, read_prompts(backend, MODEL, prompts_of(2), READ, CALLER, "embd-1"))
        assert len(found.readings) == 2
        with pytest.raises(ContextLengthError):
            await while_connected(request, read_prompts(backend, MODEL, [[1] * (CONTEXT + 1)], READ, CALLER, "embd-2"))

    run(CrowdedEngine(), work)


def test_one_prompt_that_is_too_long_costs_nothing() -> None:
    engine = CrowdedEngine()
    run(engine, read_all([[1] * CONTEXT]))
    with pytest.raises(ContextLengthError, match=r"documents\[1\] has 2049 tokens") as caught:
        run(engine, read_all([[1], [1] * (CONTEXT + 1)], param="documents"))
    assert caught.value.param == "documents"
    assert len(engine.requests) == 1


def test_each_prompt_counts_in_the_metrics() -> None:
    async def work(backend: Backend) -> None:
        await read_all(prompts_of(6))(backend)
        assert value(backend, "request_success_total", model_name=MODEL, engine="0", finished_reason="length") == 6
        assert value(backend, "request_prompt_tokens_sum", model_name=MODEL, engine="0") == 30
        assert value(backend, "request_generation_tokens_sum", model_name=MODEL, engine="0") == 0

    run(CrowdedEngine(), work)
