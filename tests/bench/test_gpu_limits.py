"""What `bench.gpu` says a step must move and multiply, against counting one by one."""

from __future__ import annotations

import pytest
import torch

from bench.gpu_clock import Clock, Rates
from bench.gpu_models import _pairs, limit_of, work_of
from bench.gpu_score import Line, scored, steps_of
from bench.models import SHAPES, build_runner, step_of
from kernels.ops import select_ops
from service.model.config import expected_shapes


@pytest.mark.parametrize("window", [None, 1, 7, 20])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 30), (5, 9), (40, 3), (18, 6)])
def test_pairs_of_queries_and_keys(start: int, count: int, window: int | None) -> None:
    assert _pairs(start, count, window) == sum(min(at + 1, window or 1 << 30) for at in range(start, start + count))


def test_a_step_reads_weights_once_and_what_its_windows_show() -> None:
    config = SHAPES["tiny-gemma"]  # two layers with a window of 24, and one without
    runner = build_runner(config, select_ops("reference"), device=torch.device("cpu"), dtype=torch.float32, num_blocks=64)
    plan = step_of(runner, [(40, [7]), (0, [1, 2, 3])], 48)
    matrices = sum(a * b for a, b in (size for size in expected_shapes(config).values() if len(size) == 2))
    token = 2 * config.num_kv_heads * config.head_width * 4
    num_bytes, flops = work_of(runner, plan)
    assert num_bytes == 4 * matrices + token * (2 * (24 + 3) + 41 + 3)
    head = config.vocab_size * config.width
    pairs = 2 * (24 + 6) + 41 + 6
    rest = flops - 2 * (matrices - head) * 4 - 2 * head * 2 - 4 * pairs * config.num_heads * config.head_width
    assert 0 <= rest <= 2 * 4 * (config.num_parameters - matrices)  # norms' weights are counted as if they were matrices
    assert limit_of(Rates(read=10.0, bf16=1e30, fp8=0.0, kernel_s=0.0), runner, [plan, plan]) == pytest.approx(2 * num_bytes / 10)


def test_every_line_has_its_first_case_before_any_has_its_second() -> None:
    lines = [
        Line(name, "", "", 0, 1, {case: lambda _: scored(1.0, 2.0) for case in "abc"[:count]}) for name, count in (("G1", 3), ("G2", 1))
    ]
    steps = steps_of(Clock(torch.device("cuda")), lines)
    assert [about["case"] for about, _ in steps] == ["G1 a", "G2 a", "G1 b", "G1 c"]
    assert steps[0][1]() == {"limit_s": 1.0, "measured_s": 2.0, "score": 0.5, "baselines": {}}


def test_a_line_that_used_up_its_time_leaves_cases_out() -> None:
    line = Line("G1", "", "", 0, 1, {case: lambda _: {} for case in "ab"}, cap_s=0.0)
    (_, first), (_, second) = steps_of(Clock(torch.device("cuda")), [line])
    assert first() == {}
    assert "had its" in second()["left_out"]
