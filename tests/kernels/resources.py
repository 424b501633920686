"""The committed table of what compiled kernels take, `resources.json`: registers a thread, shared bytes a block, spilled bytes a thread.

    python -m tests.kernels.resources        compiles everything for every chip and rewrites the table, and the part of it that
                                             docs/performance.md shows; minutes

`launches.assert_fits` asks for every launch of `test_compile*.py`: one that the table lacks, or that takes something else with the same
Triton, fails and says what to write. Spilled registers need a reason, which a rewrite keeps and a person writes.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import triton

HERE = Path(__file__).parent
PATH = HERE / "resources.json"
PAGE = HERE.parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- resources: written by python -m tests.kernels.resources -->", "<!-- resources end -->"
FIELDS = ("registers", "shared_bytes", "spilled_bytes")

table: dict[str, Any] = json.loads(PATH.read_text()) if PATH.exists() else {"triton": triton.__version__, "launches": {}}
recorded: dict[str, dict[str, Any]] | None = None
"""While the table is rewritten: what was compiled so far, by key."""


def check(key: str, found: dict[str, int], never_spills: bool) -> None:
    """found: FIELDS of a compiled launch. Raises: AssertionError where the table says something else or nothing."""
    assert not (never_spills and found["spilled_bytes"]), f"{key} spills {found['spilled_bytes']} bytes a thread"
    if recorded is not None:
        assert recorded.get(key, found) == found, f"two launches are both called {key}, and take {recorded[key]} and {found}"
        recorded[key] = dict(found)
        return
    line = f"{json.dumps(key)}: {json.dumps(found)}"
    known = table["launches"].get(key)
    assert known is not None, f"resources.json lacks a launch; run `python -m tests.kernels.resources`, or add\n{line}"
    if table["triton"] == triton.__version__:
        assert found == {name: known[name] for name in FIELDS}, f"resources.json has {known}; now it is\n{line}"
    else:  # another compiler may take more registers, but whoever does not spill must not begin to
        assert found["spilled_bytes"] <= known["spilled_bytes"], f"resources.json has {known}; now it is\n{line}"
    assert not found["spilled_bytes"] or len(known.get("reason", "")) > 20, f"resources.json: say under `reason` why {key} spills"


def summary() -> str:
    """The launches for sm_90 as a table in Markdown, a row for each kernel: from least to most."""
    kernels: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for key, entry in table["launches"].items():
        chip, name, *_ = key.split()
        if chip == "sm_90":
            kernels[name].append(entry)
    rows = ["| kernel | compiled launches | registers a thread | KiB shared | bytes spilled |", "|---|---|---|---|---|"]
    for name, entries in sorted(kernels.items()):
        spans = []
        for field, unit in zip(FIELDS, (1, 1024, 1), strict=True):
            least, most = (f"{f(entry[field] for entry in entries) / unit:.0f}" for f in (min, max))
            spans.append(least if least == most else f"{least} to {most}")
        rows.append(f"| `{name}` | {len(entries)} | {' | '.join(spans)} |")
    return "\n".join(rows)


def with_summary(page: str) -> str:
    """The page with its part between the two marks made anew."""
    head = f"Compiled for sm_90 with Triton {table['triton']}; all chips and launches: `tests/kernels/resources.json`."
    new = "\n".join((BEGIN, head, "", summary(), END))
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: new, page, flags=re.DOTALL)


def rewrite(files: list[str]) -> int:
    """Compiles, and writes table and page where all went well. The exit status."""
    global recorded
    import pytest

    recorded = {}
    status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", *files])
    if status != 0:
        return int(status)
    before = table["launches"]
    # A reason outlives a change of tiles: it belongs to chip, kernel and case.
    reasons = {key.split(" | ")[0]: entry["reason"] for key, entry in before.items() if entry.get("reason")}
    launches = {key: dict(recorded[key]) for key in sorted(recorded)}
    for key, entry in launches.items():
        if entry["spilled_bytes"]:
            entry["reason"] = reasons.get(key.split(" | ")[0], "")
    table.update({"triton": triton.__version__, "launches": launches})
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in launches.items())
    PATH.write_text(f'{{\n "triton": {json.dumps(table["triton"])},\n "launches": {{\n{lines}\n }}\n}}\n')
    PAGE.write_text(with_summary(PAGE.read_text()))
    changed = {key for key in before.keys() | launches.keys() if before.get(key) != launches.get(key)}
    print(f"{len(launches)} launches, {len(changed)} new, changed or gone")
    for key, entry in launches.items():
        if entry["spilled_bytes"] and not entry["reason"]:
            print(f"say under `reason` why this spills {entry['spilled_bytes']} bytes: {key}")
    return 0


if __name__ == "__main__":
    from tests.kernels import resources  # the module that `launches` imports is another one than __main__

    sys.exit(resources.rewrite(sorted(str(path) for path in HERE.glob("test_compile*.py"))))
