"""One server for the scorecard; after every case it must be as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scorecard.stand import Stand, standing, write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("scorecard"))


@pytest.fixture(scope="session")
def shared(model: Path) -> Iterator[Stand]:
    with standing(model, "--memory", "64MiB", "--max-sequences", "8") as stand:
        yield stand


@pytest.fixture
def stand(shared: Stand) -> Iterator[Stand]:
    yield shared
    shared.check_idle()
