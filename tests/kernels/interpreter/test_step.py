"""The kernels that prepare a step, on Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.ops import select_ops
from kernels.step import cases
from tests.kernels import checks_step
from tests.runner.served import CONFIGS, Served, build_runner, row_by_row_ops
from tests.runner.test_graphs import RerunRecorder

TINY = [pytest.param(case, id=case.name) for case in cases.CASES if case.scale == "tiny"]


@pytest.mark.parametrize("case", TINY)
def test_prepare(case: cases.StepCase) -> None:
    checks_step.check_prepare(case, "cpu")


def test_prepare_first_rows_of_larger_tensors() -> None:
    checks_step.check_first_rows_of_larger_tensors(next(case for case in cases.CASES if case.name == "new_blocks"), "cpu")


@pytest.mark.parametrize("case", [case for case in cases.CASES if case.name in ("one", "wide")], ids=lambda case: case.name)
def test_apply(case: cases.StepCase) -> None:
    checks_step.check_apply(case, "cpu")


def test_in_the_graphs_of_a_runner() -> None:
    """What a scheduler plans, step by step over one state, with these kernels and without."""
    config = CONFIGS["windows"]
    graphed = build_runner(config, 28, replace(row_by_row_ops(), step=select_ops("triton").step))
    eager = build_runner(config, 28)
    graphed.capture_graphs(6, RerunRecorder())
    for whole, hidden, drawn in Served(config, 28, 6, seed=3).steps(60):
        assert torch.equal(graphed.logits(graphed.forward(hidden)), eager.logits(eager.forward(whole)))
        assert torch.equal(graphed.cache.pool, eager.cache.pool)
        graphed.state.keep(hidden, torch.tensor(drawn))
    assert graphed.graphs is not None
    assert graphed.graphs.num_replays > 10
