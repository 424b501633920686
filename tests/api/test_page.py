"""The chat page as files: headers, caching, and that it can reach nothing but its own server. What it does in a browser: tests/page."""

from __future__ import annotations

import re
from importlib import resources

import httpx
import pytest

from tests.api.fakes import Running, running

STATIC = resources.files("service.api") / "static"
OWN = sorted(entry.name for entry in STATIC.iterdir() if entry.is_file())
VENDORED = sorted(f"vendor/{entry.name}" for entry in (STATIC / "vendor").iterdir())


@pytest.mark.parametrize("path", ["/", *(f"/static/{name}" for name in (*OWN, *VENDORED))])
def test_every_file_is_served_under_the_policy(server: Running, path: str) -> None:
    answer = httpx.get(server.url + path)
    name = path.removeprefix("/static/") if path != "/" else "index.html"
    assert answer.status_code == 200
    assert answer.content == STATIC.joinpath(*name.split("/")).read_bytes()
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = httpx.get(server.url + path, headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = httpx.head(server.url + path)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", answer.headers["etag"])


@pytest.mark.parametrize("path", ["/static/", "/static/../page.py", "/static/%2e%2e/page.py", "/static/vendor", "/static//app.js"])
def test_nothing_else_is(server: Running, path: str) -> None:
    answer = httpx.get(server.url + path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_page_needs_no_key_and_its_calls_do() -> None:
    with running(api_keys=["secret"]) as server:
        assert httpx.get(f"{server.url}/").status_code == 200
        assert httpx.get(f"{server.url}/static/app.js").status_code == 200
        assert httpx.get(f"{server.url}/v1/models").status_code == 401


@pytest.mark.parametrize("name", OWN)
def test_our_files_name_no_other_host_and_hold_no_inline_code(name: str) -> None:
    text = (STATIC / name).read_text()
    hosts = set(re.findall(r"https?://[^\s\"')]+", text)) - {"http://www.w3.org/2000/svg"}
    assert not hosts
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=", text)
    if name == "index.html":
        assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=", text)


def test_vendored_code_brings_its_licences() -> None:
    licences = (STATIC / "vendor" / "LICENSES.txt").read_text()
    for name in VENDORED:
        assert name in licences or name.endswith("LICENSES.txt")
