"""What the measurement of stalls makes of the times it gets."""

from __future__ import annotations

import pytest

from bench.stall import Stream, figures, summary


def test_figures_by_hand() -> None:
    calm = Stream(0.0, [1.0, 2.0, 2.01, 2.02, 2.04, 2.05, 2.06])
    held_up = Stream(0.0, [1.9, 2.0, 2.01, 2.02, 2.03, 2.07, 2.08, 3.0])
    arrival = Stream(2.035, [2.075])
    found = figures([calm, held_up], arrival, 2.0, 2.1)
    assert found["median_gap_ms"] == pytest.approx([10, 10])
    assert found["largest_gap_ms"] == pytest.approx([20, 40])
    assert found["stall_ms"] == pytest.approx(30), "the worst of both, and nothing that comes after the end"
    assert found["control_ms"] == pytest.approx(0, abs=1e-6)
    assert found["ttft_ms"] == pytest.approx(40)


def test_median_and_worst_of_repeats() -> None:
    rows = [{"stall_ms": value, "control_ms": 1.0, "ttft_ms": 2.0, "median_gap_ms": [3.0]} for value in (5.0, 9.0, 6.0)]
    assert summary(rows)["stall_ms"] == {"median": 6.0, "worst": 9.0}
