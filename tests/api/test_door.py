"""What is answered before the app is there: probes at once, behind the same layers; everything else as soon as it comes."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from service.api.door import Door, Probes
from service.api.layers import make_layers
from service.metrics import Metrics
from tests.api.fakes import FakeEngine

KEY = "a-key-of-some-length"


def door(**options: Any) -> tuple[Door, FakeEngine, Metrics]:
    engine = FakeEngine()
    engine.state = "loading"
    metrics = Metrics("braid", ["tiny"])
    return Door(Probes(engine), make_layers(metrics, **options)), engine, metrics  # type: ignore[arg-type]


def client(found: Door) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(found), base_url="http://localhost")


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**given: Any) -> None:
        asyncio.run(test(**given))

    return run


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse({"path": scope["path"]}, 203)(scope, receive, send)


@in_loop
async def test_probes_are_answered_before_the_app_is_there() -> None:
    found, engine, metrics = door()
    async with client(found) as http:
        answers = {path: await http.get(path) for path in ("/live", "/health", "/ping", "/ready")}
        assert [each.status_code for each in answers.values()] == [200, 503, 503, 503]
        assert answers["/ready"].json() == {"status": "loading", "detail": "weights", "progress": 0.25}
        assert answers["/ready"].headers["retry-after"] == "1"
        assert all(each.headers["x-request-id"].startswith("req_") for each in answers.values())
        head = await http.head("/live")
        assert (head.status_code, head.content) == (200, b"")
        engine.state = "ready"
        assert (await http.get("/ready")).status_code == 200
    count = metrics.registry.get_sample_value("braid:http_requests_total", {"method": "GET", "route": "/ready", "status": "503"})
    assert count == 1


@in_loop
async def test_all_else_waits_for_the_app() -> None:
    found, _, _ = door()
    async with client(found) as http:
        asked = [asyncio.create_task(http.get("/v1/models")), asyncio.create_task(http.post("/health"))]
        await asyncio.sleep(0.05)
        assert not any(each.done() for each in asked)
        found.open(app)
        assert [(await each).json()["path"] for each in asked] == ["/v1/models", "/health"]
        assert (await http.get("/live")).status_code == 203  # from now on everything is the app's
        found.shut()
        assert (await http.get("/live")).status_code == 203


@in_loop
async def test_who_waits_is_told_when_the_app_never_comes() -> None:
    found, _, _ = door()
    async with client(found) as http:
        asked = asyncio.create_task(http.get("/v1/models"))
        await asyncio.sleep(0.01)
        found.shut()
        answer = await asked
    assert (answer.status_code, answer.headers["connection"]) == (503, "close")
    assert answer.json()["error"]["type"] == "service_unavailable_error"


@pytest.mark.parametrize(("host", "status"), [("localhost", 200), ("evil.example", 421)])
@in_loop
async def test_the_layers_stand_before_the_probes_too(host: str, status: int) -> None:
    found, _, _ = door(hosts=["localhost"], api_keys=[KEY])
    async with client(found) as http:
        answer = await http.get("/live", headers={"host": host})
    assert answer.status_code == status


@in_loop
async def test_keys_are_asked_for_by_the_refusal_too() -> None:
    found, _, _ = door(api_keys=[KEY])
    found.shut()
    async with client(found) as http:
        assert (await http.get("/v1/models")).status_code == 401
        assert (await http.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})).status_code == 503
