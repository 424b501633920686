"""Pictures to be read and drawn: batches of what came together, one out at a time, each request ended once whatever happens."""

from __future__ import annotations

import pytest

from service.errors import RequestError
from service.scheduling.pictures import MAX_BATCH, PictureRequest
from service.scheduling.plan import PictureResult, PictureWork
from tests.scheduling.model import Bench, make_bench, make_request
from tests.scheduling.test_scheduler import finish_of


def add(bench: Bench, name: str, *, priority: int = 0, deadline: float | None = None, is_drawn: bool = True) -> None:
    work = PictureWork(name, codes=(1, 2)) if is_drawn else PictureWork(name, pixels=b"abc")
    bench.scheduler.add_picture(PictureRequest(work, priority, deadline), bench.now)


def done(bench: Bench, *names: str, is_good: bool = True) -> None:
    results = [PictureResult(name, pixels=b"x" if is_good else b"") for name in names]
    bench.take(bench.scheduler.commit_pictures(results, bench.now))


def test_a_plan_of_pictures_alone() -> None:
    bench = make_bench()
    add(bench, "a")
    add(bench, "b", is_drawn=False)
    plan = bench.step()
    assert plan is not None
    assert ([one.request_id for one in plan.draw], [one.request_id for one in plan.encode], plan.slices) == (["a"], ["b"], ())
    assert bench.step() is None, "nothing else is to be done until they are"
    done(bench, "a", "b")
    assert bench.ends["a", 0].picture == PictureResult("a", pixels=b"x")
    assert finish_of(bench, "b") == "stop"
    assert not bench.scheduler.has_work


def test_sequences_do_not_wait_for_pictures() -> None:
    bench = make_bench()
    add(bench, "p")
    bench.add(make_request("a", max_tokens=5))
    plan = bench.step()
    assert plan is not None
    assert len(plan.draw) == len(plan.slices) == 1
    for _ in range(4):
        plan = bench.step()
        assert plan is not None
        assert plan.draw == ()
    assert finish_of(bench, "a") == "length"


def test_the_next_batch_takes_all_that_came_meanwhile_the_urgent_first() -> None:
    bench = make_bench()
    add(bench, "first")
    bench.step()
    for index in range(MAX_BATCH + 2):
        add(bench, f"p{index}")
    add(bench, "urgent", priority=-1)
    assert bench.step() is None
    done(bench, "first")
    plan = bench.step()
    assert plan is not None
    assert [one.request_id for one in plan.draw] == ["urgent", *(f"p{index}" for index in range(MAX_BATCH - 1))]


def test_aborted_late_and_failed() -> None:
    bench = make_bench()
    for name in ("a", "b", "c"):
        add(bench, name, deadline=5.0 if name == "b" else None)
    bench.step()
    bench.take(bench.scheduler.abort("a", None, "abort", bench.now))
    bench.now = 6.0
    bench.step()
    assert (finish_of(bench, "a"), finish_of(bench, "b")) == ("abort", "deadline")
    done(bench, "a", "b", "c", is_good=False)
    assert finish_of(bench, "c") == "error"
    bench.scheduler.check()
    assert bench.scheduler.abort("a", None, "abort", 0.0) == []
    assert not bench.scheduler.has_work


def test_a_name_is_used_once() -> None:
    bench = make_bench()
    add(bench, "a")
    with pytest.raises(RequestError):
        add(bench, "a")
    with pytest.raises(RequestError):
        bench.add(make_request("a"))
    bench.add(make_request("b"))
    with pytest.raises(RequestError):
        add(bench, "b")


def test_a_failed_step_is_not_a_failed_picture() -> None:
    bench = make_bench()
    add(bench, "p")
    bench.add(make_request("a"))
    plan = bench.plan()
    assert plan is not None
    bench.take(bench.scheduler.fail(plan, bench.now))
    assert finish_of(bench, "a") == "error"
    done(bench, "p")
    assert finish_of(bench, "p") == "stop"
