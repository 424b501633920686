"""The tuner of attention's tables, tiny, on the interpreter and with a timer that stands in for a clock."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import tune_attention
from bench.tune_attention import Candidate
from kernels.attention import cases, reference
from kernels.attention import triton as attention
from kernels.attention.cases import AttentionCase

WORK = [AttentionCase("1", "", ((1, 40),)), AttentionCase("2", "", ((1, 20), (1, 9)))]
CHOICES = [Candidate(16, 16, 4, 32, 3), Candidate(16, 32, 4, 64, 3), Candidate(16, 32, 4, 64, 5)]


def test_it_times_each_candidate_on_each_workload() -> None:
    clock = itertools.count(1)
    results = []

    def timer(work: Callable[[], Any]) -> float:
        results.append(work())
        return float(next(clock))

    before = vars(attention)["decode_tiling"]
    times = tune_attention.measure(WORK, CHOICES, timer, "cpu", time.monotonic() + 60)
    assert vars(attention)["decode_tiling"] is before
    assert list(times.values()) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    for case, got in zip(WORK * 3, results, strict=False):  # every tiling computes the same attention
        q, kv = cases.build(case, torch.float32)
        torch.testing.assert_close(got, reference.attend(q, kv, case.spec), rtol=1e-5, atol=1e-5)


def test_what_does_not_compile_is_left_out() -> None:
    def timer(work: Callable[[], Any]) -> float:
        if vars(attention)["decode_tiling"](1).keys == 16:
            raise RuntimeError("out of resource: shared memory")
        return 1.0

    times = tune_attention.measure(WORK, CHOICES, timer, "cpu", time.monotonic() + 60)
    assert {one.keys for _, one in times} == {32}
    assert tune_attention.measure(WORK, CHOICES, timer, "cpu", 0.0) == {}


def test_one_order_for_all_workloads_and_stages_for_each() -> None:
    small, three, five = CHOICES
    times = {("1", small): 1.0, ("1", three): 1.5, ("1", five): 1.1, ("64", small): 9.0, ("64", three): 4.0, ("64", five): 5.0}
    order, picked = tune_attention.choose(times)
    assert order == three.order
    assert picked == {"1": five, "64": three}
    text = tune_attention.lines("decode", 128, times)
    assert 'TILES["decode", 2]: Tile(128, 16, 32, 4)' in text
    assert "SPLITS: (128, 64)" in text
    assert "Stages(128, 64, 0, 3)" in text


def test_an_order_that_did_not_run_everywhere_is_not_chosen() -> None:
    small, three, _ = CHOICES
    assert tune_attention.choose({("1", small): 1.0, ("1", three): 9.0, ("8", three): 9.0})[0] == three.order
    with pytest.raises(ValueError, match="larger --budget"):
        tune_attention.choose({("1", small): 1.0, ("8", three): 9.0})


def test_there_are_candidates_and_workloads_of_every_width() -> None:
    for phase, width in itertools.product(tune_attention.PHASES, tune_attention.GROUPS):
        assert len(tune_attention.workloads(phase, width)) >= 2
        assert len(set(tune_attention.candidates(phase))) >= 12
