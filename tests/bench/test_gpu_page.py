"""The scorecard on docs/performance.md: every line, and no figure but those of a run's file."""

from __future__ import annotations

import pytest

from bench import gpu_page

ABOUT = {"workload": "w", "limit": "l", "floor": 0.5, "target": 0.9}


def test_the_page_has_every_line_in_its_own_words() -> None:
    page = gpu_page.PAGE.read_text()
    assert page.count(gpu_page.BEGIN) == page.count(gpu_page.END) == 1
    if "Nothing of this has been measured yet." in page:
        assert gpu_page.with_block(page, gpu_page.block(None)) == page
    lines = gpu_page.lines()
    assert [line["line"] for line in lines] == [f"G{number}" for number in range(1, 24)]
    for line in lines:
        assert f"| {line['line']} | {line['workload']} | {line['limit']} |" in page


@pytest.mark.parametrize("is_void", [False, True])
def test_a_run_becomes_rows(is_void: bool) -> None:
    row = ABOUT | {"line": "G1", "case": "G1 a", "score": 0.75, "measured_s": 2.0, "baselines": {"sdpa": 3.0, "flex": "failed"}}
    rows = [row, ABOUT | {"line": "G1", "case": "G1 b", "not_built": "x"}, ABOUT | {"line": "G2", "case": "G2 c", "not_reached": True}]
    machine = {"case": "machine", "gpu": "H", "torch": "2", "triton": "3", "commit": "c0"}
    text = gpu_page.block({"void": is_void, "parts": [{"rows": [machine]}], "scorecard": rows})
    assert "| G1 | w | l | 0.5, 0.9 | a: 0.75<br>b: not built | sdpa: 1.50 x our time |" in text
    assert "| G2 | w | l | 0.5, 0.9 | c: not measured |  |" in text
    assert ("do not count" in text) == is_void
