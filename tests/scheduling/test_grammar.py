"""Grammars in the scheduler: every drawn id goes to its choice's grammar once, whatever happens to the gang, and ends the choice."""

from __future__ import annotations

import pytest

from service.scheduling.grammar import GrammarError
from tests.scheduling.model import CountingGrammar, make_bench, make_request, solo


def test_a_complete_grammar_ends_with_its_last_id() -> None:
    bench = make_bench()
    request = make_request(max_tokens=20, grammars=(CountingGrammar(3),))
    bench.add(request)
    bench.drain()
    end = bench.ends["a", 0]
    assert (end.finish, end.stop_id, end.error) == ("stop", None, None)
    assert end.token == bench.tokens["a", 0][-1]
    assert bench.tokens["a", 0] == request.grammars[0].taken == solo(request, 0, 20)[0]
    assert end.usage.completion_tokens == 3


def test_complete_at_the_last_token_is_a_stop_and_not_a_length() -> None:
    bench = make_bench()
    bench.add(make_request(max_tokens=3, grammars=(CountingGrammar(3),)))
    bench.drain()
    assert bench.ends["a", 0].finish == "stop"


def test_a_stop_id_is_not_given_to_the_grammar() -> None:
    request = make_request(max_tokens=20, stop_ids=tuple(range(11)), min_tokens=0, grammars=(CountingGrammar(3),))
    bench = make_bench()
    bench.add(request)
    bench.drain()
    assert bench.ends["a", 0].stop_id is not None
    assert request.grammars[0].taken == []


def test_choices_have_grammars_of_their_own() -> None:
    grammars = (CountingGrammar(2), CountingGrammar(5), CountingGrammar(50))
    bench = make_bench()
    bench.add(make_request(max_tokens=9, num_choices=3, grammars=grammars))
    bench.drain()
    assert [bench.ends["a", choice].finish for choice in range(3)] == ["stop", "stop", "length"]
    assert [len(grammar.taken) for grammar in grammars] == [2, 5, 9]


def test_a_grammar_error_ends_its_choice_alone() -> None:
    request = make_request(max_tokens=20)
    second = solo(request, 0, 20)[0][1]
    bench = make_bench()
    bench.add(make_request("bad", max_tokens=20, grammars=(CountingGrammar(50, refused=second),)))
    bench.add(make_request("good", max_tokens=20, grammars=(CountingGrammar(50),)))
    bench.drain()
    end = bench.ends["bad", 0]
    assert (end.finish, end.token) == ("error", None)
    assert (end.error.message, end.error.status) == (f"{second} does not fit", 400)
    assert second not in bench.tokens["bad", 0]
    assert bench.ends["good", 0].finish == "length"
    assert bench.tokens["good", 0] == solo(request, 0, 20)[0]


def test_preempted_and_computed_again_is_not_given_again() -> None:
    bench = make_bench(num_blocks=8, block_size=4, max_context=30)
    requests = [make_request(f"r{i}", [i, 2, 3], max_tokens=20, grammars=(CountingGrammar(16),)) for i in range(3)]
    for request in requests:
        bench.add(request)
    bench.drain()
    assert bench.scheduler.stats.preemptions > 0
    for request in requests:
        assert request.grammars[0].taken == bench.tokens[request.request_id, 0] == solo(request, 0, 20)[0]


@pytest.mark.parametrize("error", [None, GrammarError("nothing fits", status=400)])
def test_a_concluded_sample_ends_at_commit_without_its_id(error: GrammarError | None) -> None:
    bench = make_bench()
    request = make_request(max_tokens=20, num_choices=2, grammars=(CountingGrammar(50), CountingGrammar(50)))
    bench.add(request)
    plan = bench.plan()
    while not plan.samples:
        bench.commit(plan)
        plan = bench.plan()
    assert bench.scheduler.grammars(plan)[0] is request.grammars[0]
    bench.scheduler.conclude(plan, 0, error)
    assert ("a", 0) not in bench.ends
    bench.commit(plan)
    end = bench.ends["a", 0]
    assert (end.finish, end.token, end.error) == ("stop" if error is None else "error", None, error)
    assert request.grammars[0].taken == []
    bench.drain()
    assert bench.ends["a", 1].finish == "length"


def test_an_aborted_choice_is_no_more_concluded() -> None:
    bench = make_bench()
    bench.add(make_request(grammars=(CountingGrammar(50),)))
    plan = bench.plan()
    bench.scheduler.conclude(plan, 0, None)
    bench.take(bench.scheduler.abort("a", None, "abort", bench.now))
    bench.commit(plan)
    assert bench.ends["a", 0].finish == "abort"


def test_only_the_plan_in_flight_is_known() -> None:
    bench = make_bench()
    bench.add(make_request(grammars=(CountingGrammar(50),)))
    plan = bench.plan()
    bench.commit(plan)
    with pytest.raises(RuntimeError):
        bench.scheduler.grammars(plan)
    with pytest.raises(RuntimeError):
        bench.scheduler.conclude(plan, 0, None)


def test_without_grammars_there_are_none() -> None:
    bench = make_bench()
    bench.add(make_request(num_choices=2))
    plan = bench.plan()
    assert set(bench.scheduler.grammars(plan)) <= {None}
