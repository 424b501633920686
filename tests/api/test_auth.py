"""Who gets in: every route that is not a probe wants a key, however the request is dressed up; and keys keep their caches apart."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fastapi.routing import APIRoute

from service.api.auth import PUBLIC_PATHS, hosts_to_accept, is_public
from tests.api.fakes import MODEL, Running, running
from tests.api.test_validation import CHAT, HI, check

KEYS = ("first-key-123", "second-key-456")


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with running(api_keys=KEYS, allow_origins=["https://example.org"]) as server:
        yield server


def routes(server: Running) -> list[tuple[str, str]]:
    """(method, path) of everything the app answers; a kind of route that this does not know fails the test."""
    found: list[tuple[str, str]] = []

    def walk(some: list[Any]) -> None:
        for route in some:
            if (inner := getattr(route, "original_router", None)) is not None:
                walk(inner.routes)
                continue
            assert isinstance(route, APIRoute), route
            found.extend((method, route.path) for method in route.methods)

    walk(server.app.routes)
    return found


def example(path: str) -> str:
    """A path that the route takes; nothing is stored under that name."""
    return re.sub(r"\{\w+(:path)?\}", "nobody", path)


def test_every_route_but_the_probes_and_the_page_wants_a_key(locked: Running) -> None:
    known = routes(locked)
    assert {path for _, path in known} >= {CHAT, "/v1/completions", "/v1/models", "/metrics", "/version", *PUBLIC_PATHS}
    assert set(PUBLIC_PATHS) == {"/health", "/live", "/ready", "/ping"}
    public = {path for _, path in known if is_public(example(path))}
    assert public == {*PUBLIC_PATHS, "/", "/static/{name:path}", "/v1/images/kept/{name}"}
    for method, path in [*known, ("GET", "/no/such/path"), ("DELETE", CHAT), ("HEAD", "/v1/models"), ("BREW", "/v1/models")]:
        answer = httpx.request(method, locked.url + example(path))
        if path in public:
            assert answer.status_code in (200, 404), path
        else:
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert answer.json()["error"]["type"] == "authentication_error", path


def test_the_page_is_no_way_around_the_key(locked: Running) -> None:
    for path in (
        "/static/../v1/models",
        "/static/%2e%2e/v1/models",
        "/static//v1/models",
        "//v1/models",
        "/./v1/models",
        "/static/../../metrics",
    ):
        with socket.create_connection(("127.0.0.1", locked.port), timeout=5) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            data = b""
            while part := raw.recv(65_536):
                data += part
        assert data.split()[1] in (b"401", b"404"), path


def test_every_get_route_answers_head(locked: Running) -> None:
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    for method, path in routes(locked):
        if method == "GET":
            url = locked.url + example(path)
            asked, peeked = httpx.get(url, headers=headers), httpx.head(url, headers=headers)
            assert peeked.status_code == asked.status_code, path
            assert peeked.headers["content-type"] == asked.headers["content-type"]
            assert peeked.content == b""
    assert httpx.head(f"{locked.url}{CHAT}", headers=headers).status_code == 405
    counted = httpx.get(f"{locked.url}/metrics", headers=headers).text
    assert 'method="HEAD"' in counted


def test_names_of_the_server() -> None:
    own = ("localhost", "127.0.0.1", "::1")
    assert hosts_to_accept("127.0.0.1", has_keys=False) == (*own, "127.0.0.1")
    assert hosts_to_accept("[::1]", has_keys=False) == (*own, "::1")
    assert hosts_to_accept("localhost", has_keys=False) == (*own, "localhost")
    assert hosts_to_accept("127.0.0.1", has_keys=False, allowed=["braid.example", "10.0.0.1"]) == ("braid.example", "10.0.0.1")
    for host, has_keys, allowed in (
        ("0.0.0.0", False, ()),
        ("::", False, ()),
        ("box", False, ()),
        ("127.0.0.1", True, ()),
        ("::1", False, ("a", "*")),
    ):
        assert hosts_to_accept(host, has_keys, allowed) == ()


@pytest.fixture(scope="module")
def named() -> Iterator[Running]:
    with running(hosts=hosts_to_accept("127.0.0.1", has_keys=False)) as server:
        yield server


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "LocalHost.", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8000"])
def test_own_names_are_answered_to(named: Running, host: str) -> None:
    assert httpx.get(f"{named.url}/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example#localhost",
        "",
        "x@127.0.0.1",
    ],
)
def test_a_page_under_another_name_gets_nothing(named: Running, host: str) -> None:
    for path in ("/v1/models", "/health", "/"):
        assert check(httpx.get(f"{named.url}{path}", headers={"host": host}), 421)["code"] == "host_not_allowed"
    assert check(httpx.post(f"{named.url}{CHAT}", json={"messages": HI}, headers={"host": host}), 421)
    assert named.engine.requests == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": f"Bearer {KEYS[0]}"}, 200),
        ({"authorization": f"bearer {KEYS[1]}"}, 200),
        ({"x-api-key": KEYS[1]}, 200),
        ({"x-api-key": KEYS[0], "authorization": f"Bearer {KEYS[0]}"}, 200),
        ({"x-api-key": KEYS[0], "authorization": f"Bearer {KEYS[1]}"}, 401),
        ({"x-api-key": KEYS[0], "authorization": "Bearer wrong"}, 401),
        ({"authorization": f"Bearer {KEYS[0]}x"}, 401),
        ({"authorization": f"Bearer {KEYS[0][:-1]}"}, 401),
        ({"authorization": f"Basic {KEYS[0]}"}, 401),
        ({"authorization": KEYS[0]}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": "Bearer é"}, 401),
        ({}, 401),
    ],
)
def test_keys(locked: Running, headers: dict[str, str], status: int) -> None:
    encoded = {name: value.encode() for name, value in headers.items()}
    assert httpx.get(f"{locked.url}/v1/models", headers=encoded).status_code == status


def test_tricks(locked: Running) -> None:
    twice = [("authorization", f"Bearer {KEYS[0]}"), ("authorization", f"Bearer {KEYS[0]}")]
    assert httpx.get(f"{locked.url}/v1/models", headers=twice).status_code == 401
    for path in (f"/v1/models?api_key={KEYS[0]}", "//health/../v1/models", "/health/", "/v1/models#/health", "/%2e%2e/v1/models"):
        assert httpx.get(f"{locked.url}{path}").status_code == 401, path
    for host in ("x/?", "x?", "x#", "/health", "localhost/health?"):
        for target in ("/v1/models", "http://x/v1/models", "/v1/models?x=/health"):
            with socket.create_connection(("127.0.0.1", locked.port)) as raw:
                raw.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                assert raw.recv(100).split()[1] in (b"401", b"400"), (host, target)


def test_the_client_raises_its_own_error(locked: Running) -> None:
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0) as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_tenants_and_salts_keep_apart(locked: Running) -> None:
    def tenant(key: str, **more: object) -> str:
        headers = {"authorization": f"Bearer {key}"}
        assert httpx.post(f"{locked.url}{CHAT}", json={"messages": HI, **more}, headers=headers).status_code == 200
        return locked.engine.requests[-1].tenant

    found = [
        tenant(KEYS[0]),
        tenant(KEYS[1]),
        tenant(KEYS[0], cache_salt="a"),
        tenant(KEYS[1], cache_salt="a"),
        tenant(KEYS[0], cache_salt=""),
    ]
    assert len(set(found)) == 5
    assert found[0] == tenant(KEYS[0])
    assert not any(key in each for key in KEYS for each in found)


def test_without_keys_everybody_gets_in(server: Running) -> None:
    for headers in ({}, {"authorization": "Bearer whatever"}):
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
    server.chat()
    assert server.engine.requests[-1].tenant == ""


def test_browsers_only_from_origins_that_are_allowed(locked: Running, server: Running) -> None:
    asks = {"origin": "https://example.org", "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed = httpx.options(f"{locked.url}{CHAT}", headers=asks)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://example.org")
    refused = httpx.get(f"{locked.url}/v1/models", headers={"origin": "https://example.org"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://example.org")
    other = httpx.options(f"{locked.url}{CHAT}", headers={**asks, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in httpx.get(f"{server.url}/v1/models", headers=asks).headers
    assert httpx.options(f"{server.url}{CHAT}", headers=asks).status_code == 405


def test_models_have_slashes(locked: Running) -> None:
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEYS[0]) as client:
        assert client.models.retrieve(MODEL).id == MODEL
