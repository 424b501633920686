"""Guessing is done where measured times and right guesses promise a gain, and never costs much where they mislead."""

from __future__ import annotations

import pytest

from service.engine.draft_pace import FIRST_PURSE, MOST_PURSE, PLAIN_EVERY, DraftPace, Odds, Prospect, StepTimes


def test_times_lie_on_lines_between_and_beyond_what_was_seen() -> None:
    times = StepTimes()
    assert times.of(1) is None
    times.learn(2, 1.0)
    assert (times.of(1), times.of(2), times.of(6)) == (1.0, 1.0, 3.0), "one size alone: a larger step is taken for as much longer"
    times.learn(4, 2.0)
    assert (times.of(3), times.of(8)) == (1.5, 4.0)
    times.learn(8, 1.0)
    assert times.of(16) == 1.0, "more tokens never take less"


def test_one_slow_step_moves_a_mean_little() -> None:
    times = StepTimes()
    times.learn(1, 1.0)
    times.learn(1, 100.0)
    assert times.of(1) == pytest.approx(1.1)
    for _ in range(100):
        times.learn(1, 3.0)
    assert times.of(1) == pytest.approx(3.0, rel=0.01)


def test_large_steps_share_a_size() -> None:
    times = StepTimes()
    times.learn(300, 1.0)
    times.learn(500, 2.0)
    assert times.of(512) == pytest.approx(1.1)


def test_odds_follow_what_was_right() -> None:
    odds = Odds(0.5)
    assert odds.value == 0.5
    for _ in range(20):
        odds.learn(3, is_wrong_next=True)
    assert odds.value == pytest.approx(0.75, abs=0.1)
    for _ in range(40):
        odds.learn(0, is_wrong_next=True)
    assert odds.value < 0.2


def pace(plain_s: float = 1.0, draft_s: float = 0.1) -> DraftPace:
    """Steps take as long whatever their number of tokens; reading 100 takes ten times a step."""
    made = DraftPace()
    for size in (1, 4, 16):
        made.target.learn(size, plain_s)
        made.draft.learn(size, draft_s)
    made.draft.learn(64, 10 * draft_s)
    return made


def case(odds: float = 0.8, **more: int) -> Prospect:
    return Prospect(odds, **{"most": 8, "tokens_left": 100, "num_unread": 1, "num_running": 1, "num_guessing": 1, **more})


def test_better_odds_and_cheaper_guesses_reach_further() -> None:
    counts = [pace().choose(case(odds)) for odds in (0.05, 0.4, 0.8, 0.99)]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == 8
    assert pace(draft_s=0.4).choose(case(0.6)) < pace(draft_s=0.05).choose(case(0.6))
    assert pace(draft_s=1.0).choose(case(0.99)) == 0


def test_what_is_unread_has_to_pay_over_what_is_to_come() -> None:
    assert pace().choose(case(0.8, num_unread=64)) > 0
    assert pace().choose(case(0.8, num_unread=64, tokens_left=2)) == 0
    assert pace().choose(case(0.8, num_unread=8000)) == 0


def test_beside_many_that_do_not_guess_there_is_less_to_gain() -> None:
    assert pace().choose(case(0.5, num_running=1)) > 0
    assert pace(draft_s=0.3).choose(case(0.5, num_running=4, num_guessing=1)) == 0


def test_nothing_is_guessed_before_a_plain_step_is_known() -> None:
    assert DraftPace().choose(case()) == 0
    assert not DraftPace().can_probe(case())
    known = DraftPace()
    known.learn_step(1, 1, 1.0, has_guesses=False)
    assert known.choose(case()) == 0
    assert known.can_probe(case()), "what a guess costs has to be found out"


def test_an_empty_purse_ends_all_guesses_until_plain_steps_have_filled_it() -> None:
    made = pace()
    made.learn_drafting(FIRST_PURSE + 0.5, 1)
    assert made.choose(case(0.99)) == 0
    for _ in range(51):
        made.learn_step(1, 1, 1.0, has_guesses=False)
    assert made.choose(case(0.99)) > 0


def test_gains_save_up_only_so_much() -> None:
    made = pace()
    for _ in range(100):
        made.learn_saved(8, 1)
    assert made.purse == MOST_PURSE


def test_a_probe_costs_what_it_adds_to_a_step() -> None:
    made = pace(draft_s=0.4)
    made.purse = 0.7
    assert not made.can_probe(case(0.1))
    made.purse = 0.9
    assert made.can_probe(case(0.1))
    assert not made.can_probe(case(0.1, num_unread=64))


def test_some_steps_stay_plain() -> None:
    made = DraftPace()
    assert sum(made.is_plain_due() for _ in range(10 * PLAIN_EVERY)) == 10
