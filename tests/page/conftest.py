"""A browser, a server and pages that are held to what every page has to keep to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.api.fakes import Running
from tests.page.window import CHROMIUM, OpenPage, chatting

# As root it has no sandbox; the rest keeps it from calling anybody by itself.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
MORE_FLAGS = ("--disable-component-update", "--disable-sync")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *MORE_FLAGS])
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[Running]:
    with chatting() as server:
        yield server


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens a page, and at the end holds it to: no error in the console that was not expected, no request to another server."""
    contexts, faults = [], []

    def open_it(server: Running, *, expected_error: str = "", **options: object) -> Page:
        context = browser.new_context(**options)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)

        def note(kind: str, text: str) -> None:
            if not (expected_error and expected_error in text):
                faults.append(f"{kind}: {text}")

        page.on("pageerror", lambda error: note("error", str(error)))
        page.on("console", lambda message: note("console", message.text) if message.type in ("error", "warning") else None)
        page.on("request", lambda request: None if request.url.startswith((server.url, "data:")) else note("request", request.url))
        page.goto(f"{server.url}/")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not faults
