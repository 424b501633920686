"""When the engine counts as stalled, and when it does not."""

from __future__ import annotations

import pytest

from service.engine.messages import Beat
from service.engine.vitals import IDLE, Vitals


@pytest.mark.parametrize(
    ("age_s", "estimate_s", "is_stalled"),
    [(0.0, 0.0, False), (1.9, 0.01, False), (2.1, 0.01, True), (2.1, 1.0, False), (4.9, 1.0, False), (5.1, 1.0, True)],
)
def test_a_step_is_overdue_after_two_seconds_or_five_estimates(age_s: float, estimate_s: float, is_stalled: bool) -> None:
    vitals = Vitals()
    vitals.hear(Beat(age_s, estimate_s))
    assert vitals.is_stalled == is_stalled


def test_silence_is_a_stall_even_without_a_step() -> None:
    vitals = Vitals()
    for _ in range(8):
        vitals.wait(0.25)
    assert not vitals.is_stalled
    vitals.wait(0.25)
    assert vitals.is_stalled
    vitals.hear()
    assert not vitals.is_stalled


def test_a_step_ages_between_beats() -> None:
    vitals = Vitals()
    vitals.hear(Beat(1.8, 0.1))
    vitals.wait(0.25)
    assert vitals.is_stalled
    assert vitals.step_age_s == pytest.approx(2.05)


def test_each_stall_counts_once_and_ends_by_itself() -> None:
    vitals = Vitals()
    for _ in range(2):
        for age_s in (2.5, 3.0, 3.5):
            vitals.hear(Beat(age_s, 0.0))
            vitals.wait(0.25)
        assert vitals.stalled_s == 0.75
        vitals.hear(IDLE)
        vitals.wait(0.25)
        assert vitals.stalled_s == 0
    assert vitals.num_stalls == 2
