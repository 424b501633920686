"""What the page's tests share: which browser there is, a server to chat with, and what a person does at a page.

CHROMIUM names the browser; otherwise `chromium` is looked for. BRAID_SCREENSHOTS: a folder in which pictures of the page are left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from playwright.sync_api import Page

from tests.api.fakes import Running, running

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OpenPage = Callable[..., Page]


@contextlib.contextmanager
def chatting(**options: Any) -> Iterator[Running]:
    """A server whose model says that it can chat."""
    with running(**options) as server:
        server.codec.template = SimpleNamespace(variables=frozenset())  # type: ignore[assignment]
        yield server


def ask(page: Page, text: str = "Plan my day, please.") -> None:
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def screenshot(page: Page, name: str) -> None:
    if folder := os.environ.get("BRAID_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")
