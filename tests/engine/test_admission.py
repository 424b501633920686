"""What is in flight is counted exactly, and refusals say when to come again."""

from __future__ import annotations

import pytest

from service.engine.admission import MAX_RETRY_S, MIN_RETRY_S, Admission
from service.errors import OverloadedError, RequestError


def test_requests_are_bounded_and_places_come_back() -> None:
    admission = Admission(max_requests=2, max_tokens=1000)
    for name in "ab":
        admission.check(10)
        admission.enter(name, 10, now=0.0)
    with pytest.raises(OverloadedError) as refused:
        admission.check(10)
    assert refused.value.retry_after_s == MIN_RETRY_S
    admission.leave("a", now=1.0)
    admission.check(10)


def test_generated_tokens_count_while_they_are_in_flight() -> None:
    admission = Admission(max_requests=10, max_tokens=100)
    admission.enter("a", 50, now=0.0)
    admission.check(50)
    admission.grow("a", 1)
    with pytest.raises(OverloadedError):
        admission.check(50)
    admission.leave("a", now=1.0)
    assert (admission.num_requests, admission.num_tokens) == (0, 0)


def test_choices_count_one_each_and_their_prompt_once() -> None:
    admission = Admission(max_requests=4, max_tokens=100)
    admission.check(60, num_choices=3)
    admission.enter("a", 60, now=0.0, num_choices=3)
    assert (admission.num_requests, admission.num_tokens) == (3, 60)
    admission.check(10)
    with pytest.raises(OverloadedError):
        admission.check(10, num_choices=2)
    admission.leave("a", now=1.0)
    admission.check(10, num_choices=4)
    assert (admission.num_requests, admission.num_tokens) == (0, 0)


def test_what_an_idle_server_would_refuse_is_no_overload() -> None:
    admission = Admission(max_requests=2, max_tokens=10)
    admission.check(10, num_choices=2)
    for prompt_len, num_choices, param in ((11, 1, None), (10, 3, "n")):
        with pytest.raises(RequestError) as refused:
            admission.check(prompt_len, num_choices)
        assert (refused.value.status, refused.value.param) == (400, param)


@pytest.mark.parametrize(("seconds", "expected"), [(0.1, MIN_RETRY_S), (20.0, 5.0), (10_000.0, MAX_RETRY_S)])
def test_retry_after_follows_how_long_requests_take(seconds: float, expected: float) -> None:
    admission = Admission(max_requests=1, max_tokens=10)
    admission.enter("a", 1, now=0.0)
    admission.leave("a", now=seconds)
    admission.enter("b", 1, now=seconds)
    with pytest.raises(OverloadedError) as refused:
        admission.check(1)
    assert refused.value.retry_after_s == expected
