"""What the load command adds to `braid bench serve`: the loads it asks for, and its table."""

from __future__ import annotations

from typing import Any

import pytest

from bench.load import load_of, measure, print_table
from service.bench.options import Options
from tests.bench.fake_server import FakeServer, running


def test_users_are_a_closed_loop_of_full_answers() -> None:
    load = load_of(3, 4, random_input_len=40)
    assert (load.num_prompts, load.max_concurrency, load.ignore_eos, load.dataset_name) == (12, 3, True, "random")
    shared = load_of(3, 4, shared_prefix=100)
    assert (shared.dataset_name, shared.shared_prefix_len) == ("shared-prefix", 100)
    assert load_of(1, 1) == Options(num_prompts=1, max_concurrency=1, ignore_eos=True, warmups=0)


def test_loads_are_measured_in_turn_after_one_warm_up(capsys: pytest.CaptureFixture[str]) -> None:
    more: dict[str, Any] = {"random_input_len": 20, "random_output_len": 4}
    with running(FakeServer()) as server:
        rows = measure(server.url, [load_of(1, 2, **more), load_of(2, 2, **more)])
    assert [row["completed"] for row in rows] == [2, 4]
    prompts = {body["messages"][0]["content"] for body in server.asked}
    assert (len(server.asked), len(prompts)) == (8, 8)
    print_table("both", rows, 100.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["users", "1", "2"]
