"""The committed table of compiled resources: complete, with reasons, and shown on its page as it is."""

from __future__ import annotations

import pytest
import triton

from tests.kernels import resources
from tests.kernels.launches import NEVER_SPILL


def test_every_spill_has_a_reason() -> None:
    for key, entry in resources.table["launches"].items():
        if entry["spilled_bytes"]:
            assert key.split()[1] not in NEVER_SPILL
            assert len(entry["reason"]) > 20, key


def test_a_launch_that_the_table_lacks_or_contradicts_fails() -> None:
    key, entry = next(iter(resources.table["launches"].items()))
    found = {name: entry[name] for name in resources.FIELDS}
    resources.check(key, found, never_spills=False)
    with pytest.raises(AssertionError, match="or add"):
        resources.check(key + " more", found, never_spills=False)
    if resources.table["triton"] == triton.__version__:
        with pytest.raises(AssertionError, match="now it is"):
            resources.check(key, found | {"registers": found["registers"] + 1}, never_spills=False)
    with pytest.raises(AssertionError, match="now it is"):
        resources.check(key, found | {"spilled_bytes": found["spilled_bytes"] + 8}, never_spills=False)


def test_the_page_shows_the_table() -> None:
    page = resources.PAGE.read_text()
    assert resources.BEGIN in page
    assert resources.with_summary(page) == page
