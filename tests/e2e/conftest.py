"""The real server, started as a user starts it, with the real default weights; once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.load import serving


@pytest.fixture(scope="session")
def server(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address. The weights are in the cache by then, as after a first start."""
    with serving("", ["--max-sequences", "80", "--data-dir", str(tmp_path_factory.mktemp("data"))]) as (url, _):
        yield url
