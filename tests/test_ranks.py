"""The ranks of a split engine as processes that compute nothing: what they are told, what they agree on, and how all end with one."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from service.engine.messages import Load, ModelSource
from service.errors import StartupError
from service.ranks import Ranks, check_load
from service.scheduling.plan import Slice
from tests.engine.test_client import load_of

PATIENCE_S = 20.0
PIECE = Slice(7, 3, (1, 2, 3), ((4, -1), (5, 6)), grid_starts=(-1, 3, 3), is_first_known=True)


@contextlib.contextmanager
def ranks_of(size: int, how: str = "well") -> Iterator[tuple[Ranks, queue.SimpleQueue[str]]]:
    """Rank 0's side, and the reasons for which it was lost. Afterwards no process may be left."""
    reasons: queue.SimpleQueue[str] = queue.SimpleQueue()
    command = (sys.executable, "-m", "tests.fake_follower", "--how", how)
    before = set(psutil.Process().children())
    ranks = Ranks(load_of(tensor_parallel=size), reasons.put, command)
    started = set(psutil.Process().children()) - before
    assert len(started) == size - 1
    try:
        yield ranks, reasons
    finally:
        ranks.close()
    assert not any(process.is_running() for process in started)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_all_agree_on_the_least_and_are_told_every_step() -> None:
    with ranks_of(3) as (ranks, reasons):
        assert ranks.least(1000) == 98
        ranks.tell(0, (PIECE,))
        assert ranks.least(1000) == 3
        ranks.tell(5, (PIECE, PIECE))
        assert ranks.least(4) == 4
    assert reasons.empty()


@pytest.mark.parametrize(("how", "status"), [("exit", 3), ("die", -9)])
def test_the_end_of_one_is_told_at_once(how: str, status: int) -> None:
    with ranks_of(3, how) as (ranks, reasons):
        ranks.least(1000)
        ranks.tell(0, (PIECE,))
        assert reasons.get(timeout=PATIENCE_S) == f"rank 2 of 3 ended unexpectedly (status {status})"
        ranks.give_up("something that came of it")
    assert reasons.empty()


def test_a_rank_says_why_it_can_not_start() -> None:
    with ranks_of(2, "refuse") as (_, reasons):
        assert reasons.get(timeout=PATIENCE_S) == "the weights are not what they say"
    assert reasons.empty()


def test_a_stuck_rank_ends_with_its_connection() -> None:
    """Nobody reads there; still it ends by itself, with status 0."""
    with ranks_of(2, "stuck") as (ranks, reasons):
        ranks.least(1000)
        ranks.tell(0, (PIECE,))
        time.sleep(0.1)
        (process,) = [process for process, _ in ranks._others]
    assert process.returncode == 0
    assert reasons.empty()


def test_ranks_do_not_outlive_the_first() -> None:
    code = (
        "import os, sys; from service.ranks import *; from tests.engine.test_client import load_of; "
        "ranks = Ranks(load_of(tensor_parallel=3), print, (sys.executable, '-m', 'tests.fake_follower')); ranks.least(1000); "
        "print(*(process.pid for process, _ in ranks._others), flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == -9
    pids = list(map(int, done.stdout.split()))
    assert len(pids) == 2
    deadline = time.monotonic() + PATIENCE_S
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank is still there"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": "int4"}, "--tensor-parallel 2 and --dtype int4 do not go together; .*float32, bfloat16, int8 or fp8"),
        ({"draft": ModelSource("d", "")}, "--tensor-parallel 2 and --draft-model do not go together"),
        ({"device": "cuda:1"}, "--tensor-parallel 2 takes the first 2 GPUs and --device cuda:1 names one; use --device cuda"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, object], reason: str) -> None:
    load: Load = load_of(tensor_parallel=2, **fields)
    with pytest.raises(StartupError, match=reason):
        check_load(load)
    check_load(load_of(tensor_parallel=2))
